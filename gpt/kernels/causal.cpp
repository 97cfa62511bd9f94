// Causal attention over whole sequences of bf16, and its gradient. Its weights are never all there at once: the
// backward pass makes them anew. A head of a row is the work of one thread, so threads make no difference to the result.
//
// Shapes: B batch rows, T positions, H heads, D width of a head, even. qkv is (B, T, 3, H, D), out (B, T, H, D).
#include <cmath>
#include <memory>
#include <new>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "vectors.h"

namespace {

constexpr int ROWS = 4, COLUMNS = 4 * LANES;  // of a tile of a product: its sums fill 16 registers
constexpr int BLOCK = 64;                     // queries whose gradients are made at a time

struct Attention {  // as gpt/kernels/native_attention.py declares it
    int64_t rows, positions, heads, width, threads;
    const uint16_t *qkv;
    uint16_t *out;
    float *logsums;          // (B, H, T) logarithm of the sum of the exponentials of a query's scores
    const uint16_t *to_out;  // gradients; null in the forward pass
    uint16_t *to_qkv;
};

inline size_t padded(size_t count, size_t multiple = LANES) { return (count + multiple - 1) / multiple * multiple; }

// ---- products of matrices of pairs: an int32 is two bf16 that lie one after the other along what is summed over

inline void multiply_pairs(Floats &sum, Ints a, Ints b) {
#ifdef __AVX512BF16__
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    sum = multiply_add((Floats)(a << 16), (Floats)(b << 16), sum);
    sum = multiply_add((Floats)(a & -65536), (Floats)(b & -65536), sum);
#endif
}

struct Left {  // with `step` other than 1 the transpose of what lies there
    const int32_t *data;
    size_t stride, step;
};
struct Right {
    const int32_t *data;
    size_t stride;
};

template <int VECTORS, size_t... I>  // only sums with constant numbers, I, stay in registers: see products.h
void tile(Left a, Right b, int pairs, bool adds, float *c, size_t stride, std::index_sequence<I...>) {
    Floats sums[sizeof...(I)] = {};
    for (int pair = 0; pair < pairs; pair++) {
        Ints left[ROWS], right[VECTORS];
        for (int row = 0; row < ROWS; row++) left[row] = Ints{} + a.data[row * a.stride + pair * a.step];
        for (int v = 0; v < VECTORS; v++) right[v] = read<Ints>(b.data + pair * b.stride + v * LANES);
        (multiply_pairs(sums[I], left[I / VECTORS], right[I % VECTORS]), ...);
    }
    auto put = [&](float *to, Floats sum) { store(to, adds ? load(to) + sum : sum); };
    (put(c + I / VECTORS * stride + I % VECTORS * LANES, sums[I]), ...);
}
template <int VECTORS> void tile(Left a, Right b, int pairs, bool adds, float *c, size_t stride) {
    tile<VECTORS>(a, b, pairs, adds, c, stride, std::make_index_sequence<ROWS * VECTORS>{});
}

// c (ROWS, columns) becomes a (ROWS, pairs) @ b (pairs, columns), or it is added; columns are a multiple of LANES.
void product(Left a, Right b, int pairs, int columns, bool adds, float *c, size_t stride) {
    for (; columns >= COLUMNS; columns -= COLUMNS, b.data += COLUMNS, c += COLUMNS)
        tile<4>(a, b, pairs, adds, c, stride);
    if (columns == 3 * LANES) tile<3>(a, b, pairs, adds, c, stride);
    if (columns == 2 * LANES) tile<2>(a, b, pairs, adds, c, stride);
    if (columns == LANES) tile<1>(a, b, pairs, adds, c, stride);
}

// ---- parts of a tensor, and how they are laid out for products

struct Part {  // `count` rows of D bf16; those beyond are taken for 0
    const uint16_t *data;
    size_t stride, count, D;

    Part some(size_t start, size_t most) const {
        return {data + start * stride, stride, start < count ? std::min(most, count - start) : 0, D};
    }
    void copy(size_t rows, int32_t *to) const {  // (rows, D / 2)
        for (size_t i = 0; i < rows; i++, to += D / 2)
            i < count ? memcpy(to, data + i * stride, 2 * D) : memset(to, 0, 2 * D);
    }
    void along_width(size_t rows, int32_t *scratch, int32_t *to, size_t line) const {  // (D / 2, rows)
        for (size_t start = 0; start < rows; start += LANES) {
            some(start, LANES).copy(LANES, scratch);
            for (size_t d = 0; d < D / 2; d++)
                for (int i = 0; i < LANES; i++) to[d * line + start + i] = scratch[i * (D / 2) + d];
        }
    }
    void along_rows(size_t rows, int32_t *to, size_t line) const {  // (rows / 2, D)
        for (size_t i = 0; i < rows; i += 2, to += line)
            for (size_t d = 0; d < D; d += LANES) {
                Ints pair = wide(i, d) | wide(i + 1, d) << 16;
                memcpy(to + d, &pair, 64);
            }
    }
    Ints wide(size_t row, size_t d) const {
        if (row >= count) return Ints{};
        const uint16_t *from = data + row * stride + d;
        return __builtin_convertvector(D - d >= LANES ? read<Halves>(from) : read<Halves>(from, 2 * (D - d)), Ints);
    }
};

void write(const float *from, size_t line, size_t rows, size_t D, uint16_t *to, size_t stride) {
    for (size_t i = 0; i < rows; i++)
        for (size_t d = 0; d < D; d += LANES) store(to + i * stride + d, load(from + i * line + d), D - d);
}

inline Floats first_lanes(Floats x, int count, float others) {
    constexpr Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return LANE < count ? x : Floats{} + others;
}

// ---- one head of one row

struct Head {
    const Attention &a;
    size_t D, T, C, columns, keys;  // columns: D padded; keys: T padded, and more, so that lines meet in no cache set
    float scale;
    // scratch: of the forward pass the first line
    float *scores, *sums;
    float *to_k, *to_v, *to_weights;
    int32_t *part, *k_by_width, *k_by_rows, *q, *line;  // forward, k_by_rows holds the values
    int32_t *v_by_width, *to_out_rows, *q_by_rows, *to_out_by_rows, *weights, *slopes;
    // of the head that was chosen
    Part queries, k, v, out, to_out;
    uint16_t *own_out, *to_q;
    float *logsums;

    Head(const Attention &a, float *memory = nullptr)
        : a(a), D(a.width), T(a.positions), C(a.heads * D), columns(padded(D)), keys(padded(T) + LANES),
          scale(1 / std::sqrt(float(D))) {
        lay_out(memory);
    }

    size_t lay_out(float *memory) {  // returns how many 4-byte words that takes
        size_t used = 0;
        auto floats = [&](size_t count) { return used += count, memory ? memory + used - count : nullptr; };
        auto pairs = [&](size_t count) { return (int32_t *)floats(count); };
        scores = floats(ROWS * keys), sums = floats(ROWS * columns);
        part = pairs(LANES * D / 2), k_by_width = pairs(D / 2 * keys), k_by_rows = pairs(keys / 2 * columns);
        q = pairs(BLOCK * D / 2), line = pairs(ROWS * keys / 2);
        if (!a.to_out) return used;
        to_k = floats(keys * columns), to_v = floats(keys * columns), to_weights = floats(ROWS * keys);
        v_by_width = pairs(D / 2 * keys), to_out_rows = pairs(BLOCK * D / 2);
        q_by_rows = pairs(BLOCK / 2 * columns), to_out_by_rows = pairs(BLOCK / 2 * columns);
        weights = pairs(BLOCK / 2 * keys), slopes = pairs(BLOCK / 2 * keys);
        return used;
    }

    void choose(size_t row, size_t head) {
        size_t from = row * T * C + head * D;
        auto third = [&](size_t which) { return Part{a.qkv + 3 * row * T * C + which * C + head * D, 3 * C, T, D}; };
        queries = third(0), k = third(1), v = third(2);
        own_out = a.out + from, out = {own_out, C, T, D}, logsums = a.logsums + (row * a.heads + head) * T;
        if (a.to_out) to_out = {a.to_out + from, C, T, D}, to_q = a.to_qkv + 3 * row * T * C + head * D;
    }

    void forward() {
        k.along_width(padded(T), part, k_by_width, keys);
        v.along_rows(padded(T), k_by_rows, columns);
        for (size_t first = 0; first < T; first += ROWS) {
            size_t end = padded(std::min(first + ROWS, T)), count = std::min<size_t>(ROWS, T - first);
            queries.some(first, ROWS).copy(ROWS, q);
            product({q, D / 2, 1}, {k_by_width, keys}, D / 2, end, false, scores, keys);
            for (size_t i = 0; i < ROWS; i++) {
                float logsum = softmax(scores + i * keys, first + i + 1, end, (uint16_t *)(line + i * keys / 2));
                if (i < count) logsums[first + i] = logsum;
            }
            product({line, keys / 2, 1}, {k_by_rows, columns}, end / 2, columns, false, sums, columns);
            write(sums, columns, count, D, own_out + first * C, C);
        }
    }

    // Weights of the first `seen` of `end` scores, 0 for the others; returns the logarithm of their sum.
    float softmax(float *scores, int seen, int end, uint16_t *weights) const {
        Floats most = Floats{} - INFINITY, sum = {};
        for (int j = 0; j < end; j += LANES) {
            Floats x = first_lanes(load(scores + j) * scale, seen - j, -INFINITY);
            store(scores + j, x);
            most = greater(most, x);
        }
        float largest = greatest(most);
        for (int j = 0; j < end; j += LANES) {  // nan shows in the sum
            Floats x = first_lanes(exp(load(scores + j) - largest), seen - j, 0);
            store(scores + j, x);
            sum += x;
        }
        float whole = total(sum), inverse = 1 / whole;
        for (int j = 0; j < end; j += LANES) store(weights + j, load(scores + j) * inverse);
        return largest + std::log(whole);
    }

    void backward() {
        memset(to_k, 0, keys * columns * sizeof *to_k);
        memset(to_v, 0, keys * columns * sizeof *to_v);
        k.along_width(padded(T), part, k_by_width, keys);
        v.along_width(padded(T), part, v_by_width, keys);
        k.along_rows(padded(T), k_by_rows, columns);
        for (size_t start = 0; start < T; start += BLOCK) {
            size_t count = padded(std::min<size_t>(BLOCK, T - start), ROWS), last = padded(std::min(start + BLOCK, T));
            Part some = queries.some(start, BLOCK), upstream = to_out.some(start, BLOCK);
            some.copy(count, q), some.along_rows(count, q_by_rows, columns);
            upstream.copy(count, to_out_rows), upstream.along_rows(count, to_out_by_rows, columns);
            for (size_t first = 0; first < count; first += ROWS) {
                size_t end = padded(std::min(start + first + ROWS, T)), at = first * D / 2;
                product({q + at, D / 2, 1}, {k_by_width, keys}, D / 2, end, false, scores, keys);
                product({to_out_rows + at, D / 2, 1}, {v_by_width, keys}, D / 2, end, false, to_weights, keys);
                for (int i = 0; i < ROWS; i += 2) slopes_of_two(start, first + i, i, end, last);
                product({line, keys / 2, 1}, {k_by_rows, columns}, end / 2, columns, false, sums, columns);
                if (start + first < T) {
                    size_t rows = std::min<size_t>(ROWS, T - start - first);
                    write(sums, columns, rows, D, to_q + (start + first) * 3 * C, 3 * C);
                }
            }
            for (size_t j = 0; j < last; j += ROWS) {
                size_t skip = j > start ? (j - start) / 2 : 0;  // pairs of queries that come before these keys
                size_t at = skip * keys + j, from = skip * columns;
                int pairs = int(count / 2) - int(skip);  // none where these keys are padding
                float *to_ks = to_k + j * columns, *to_vs = to_v + j * columns;
                product({slopes + at, 1, keys}, {q_by_rows + from, columns}, pairs, columns, true, to_ks, columns);
                product({weights + at, 1, keys}, {to_out_by_rows + from, columns}, pairs, columns, true, to_vs, columns);
            }
        }
        write(to_k, columns, T, D, to_q + C, 3 * C);
        write(to_v, columns, T, D, to_q + 2 * C, 3 * C);
    }

    // From scores and gradients of weights, rows `i` and `i` + 1 of those computed, which are queries `row` and `row` + 1
    // of the block from `start` on: their weights and the gradients of their scores, as pairs of the two; the latter
    // also in `line`, query by query. 0 from `end` to `last`.
    void slopes_of_two(size_t start, size_t row, int i, size_t end, size_t last) const {
        float logsum[2] = {}, mean[2] = {};  // mean: of the weights' gradients, by weight
        int seen[2] = {};
        for (int one = 0; one < 2; one++) {
            size_t at = start + row + one;
            if (at >= T) continue;
            seen[one] = int(at + 1), logsum[one] = logsums[at];
            Floats sum = {};
            for (size_t d = 0; d < D; d += LANES)
                sum += load(to_out.data + at * C + d, D - d) * load(out.data + at * C + d, D - d);
            mean[one] = total(sum);
        }
        int32_t *weight_pairs = weights + row / 2 * keys, *slope_pairs = slopes + row / 2 * keys;
        for (size_t j = 0; j < end; j += LANES) {
            Ints both_weights = {}, both_slopes = {};
            for (int one = 0; one < 2; one++) {
                size_t at = (i + one) * keys + j;
                Floats weight = first_lanes(exp(load(scores + at) * scale - logsum[one]), seen[one] - int(j), 0);
                Halves slope = halve(weight * (load(to_weights + at) - mean[one]) * scale);
                memcpy((uint16_t *)line + at, &slope, 32);
                both_weights |= __builtin_convertvector(halve(weight), Ints) << 16 * one;
                both_slopes |= __builtin_convertvector(slope, Ints) << 16 * one;
            }
            memcpy(weight_pairs + j, &both_weights, 64);
            memcpy(slope_pairs + j, &both_slopes, 64);
        }
        memset(weight_pairs + end, 0, (last - end) * sizeof *weight_pairs);
        memset(slope_pairs + end, 0, (last - end) * sizeof *slope_pairs);
    }
};

}  // namespace

extern "C" bool gpt_has_threads() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

// The forward pass, or the backward pass if there are gradients; returns 0, or -1 where memory ran out.
extern "C" int64_t gpt_causal_attention(const Attention *a) {
    size_t words = Head(*a).lay_out(nullptr);
    std::unique_ptr<float[]> memory(new (std::nothrow) float[words * a->threads]);
    if (!memory) return -1;
#pragma omp parallel num_threads(a->threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        Head head(*a, memory.get() + thread * words);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a->rows * a->heads; i++) {
            head.choose(i / a->heads, i % a->heads);
            a->to_out ? head.backward() : head.forward();
        }
    }
    return 0;
}
