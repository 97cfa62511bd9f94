// Causal attention over whole sequences of bf16, and its gradient, as in FlashAttention (Dao et al. 2022,
// arXiv:2205.14135) on a CPU. One thread computes a head of a batch row alone, so the number of threads changes no bit.
//
// Shapes: B batch rows, T positions, H heads, D width of a head, even. For one head Q, K, V, O and their gradients are
// (T, D); S = Q K^T * scale, the weights P = softmax(S), dP and dS are (T, T) and exist for a few queries at a time.
//
// Forward, for each tile of 4 queries and all keys up to the last of them:
//     S = Q K^T * scale, -inf after the query's own position
//     log_sum = row max of S + log(row sum of exp(S - row max))      kept for the backward pass
//     P = exp(S - row max) / row sum                                 rounded to bf16
//     O = P V
// Backward, for each block of 64 queries. P is computed again from log_sum: to keep it would take T^2 numbers for each
// head, and reading them would take longer.
//     for each tile of 4 queries:
//         P  = exp(Q K^T * scale - log_sum)
//         dP = dO V^T
//         dS = P * (dP - row sum of dO * O) * scale
//         dQ = dS K
//     for each tile of 4 keys:
//         dK += dS^T Q,  dV += P^T dO
//
// Products are sums of pairs, as vdpbf16ps computes them: an int32 holds two bf16 that follow each other along the
// dimension that is summed over, the first in its lower half.
//     Q K^T, dO V^T  sum over D:          pairs (q[d], q[d + 1]): Q as it lies in memory; K^T as (D / 2, T) pairs
//     P V, dS K      sum over positions:  pairs (p[j], p[j + 1]): P as it lies in memory; V as (T / 2, D) pairs of rows
//     dS^T Q, P^T dO sum over queries:    dS and P as (queries / 2, T) pairs of rows, read as transposed
#include <cmath>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr int ROWS = 4, VECTORS = REGISTERS / 8;  // a tile of a product: its sums fill half of the registers
constexpr size_t BLOCK = 64;                  // queries

struct Attention {  // as native_attention.py declares it
    int64_t rows, positions, heads, width, threads;
    const uint16_t *qkv;    // (B, T, 3, H, D)
    uint16_t *out;          // (B, T, H, D)
    float *log_sums;        // (B, H, T)
    const uint16_t *d_out;  // gradients; null in the forward pass
    uint16_t *d_qkv;
};

// ---- products of matrices of pairs

inline void multiply_pairs(Floats &sum, Ints a, Ints b) {
#ifdef __AVX512BF16__
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
    sum = multiply_add((Floats)(a << 16), (Floats)(b << 16), sum);
    sum = multiply_add((Floats)(a & -65536), (Floats)(b & -65536), sum);
#endif
}

struct Left {  // element (row, pair) at row * stride + pair * step
    const int32_t *data;
    size_t stride, step;
};
struct Right {  // element (pair, column) at pair * stride + column
    const int32_t *data;
    size_t stride;
};

template <int COUNT, size_t... I>  // COUNT vectors of columns. I: the numbers of the sums, constants as in products.h
void tile(Left a, Right b, int pairs, bool adds, float *c, size_t stride, std::index_sequence<I...>) {
    Floats sums[sizeof...(I)] = {};
    for (int pair = 0; pair < pairs; pair++) {
        Ints left[ROWS], right[COUNT];
        for (int row = 0; row < ROWS; row++) left[row] = Ints{} + a.data[row * a.stride + pair * a.step];
        for (int v = 0; v < COUNT; v++) right[v] = read<Ints>(b.data + pair * b.stride + v * LANES);
        (multiply_pairs(sums[I], left[I / COUNT], right[I % COUNT]), ...);
    }
    auto put = [&](float *to, Floats sum) { store(to, adds ? load(to) + sum : sum); };
    (put(c + I / COUNT * stride + I % COUNT * LANES, sums[I]), ...);
}
template <int COUNT> void tile(Left a, Right b, int pairs, bool adds, float *c, size_t stride) {
    tile<COUNT>(a, b, pairs, adds, c, stride, std::make_index_sequence<ROWS * COUNT>{});
}

// Computes a (ROWS, pairs) @ b (pairs, columns) into c (ROWS, stride), or adds it; columns are a multiple of LANES.
template <int COUNT = VECTORS>
void product(Left a, Right b, int pairs, int columns, bool adds, float *c, size_t stride) {
    constexpr int WIDTH = COUNT * LANES;
    for (; columns >= WIDTH; columns -= WIDTH, b.data += WIDTH, c += WIDTH) tile<COUNT>(a, b, pairs, adds, c, stride);
    if constexpr (COUNT > 1) product<COUNT - 1>(a, b, pairs, columns, adds, c, stride);
}

// ---- the layouts of a head's queries, keys, values and gradients

struct Positions {  // `count` positions of D bf16 each; those after the last are read as 0
    const uint16_t *data;
    size_t stride, count, D;

    Positions from(size_t start) const { return {data + start * stride, stride, count - std::min(start, count), D}; }
    void copy(size_t rows, int32_t *to) const {  // -> (rows, D / 2)
        for (size_t i = 0; i < rows; i++, to += D / 2)
            i < count ? memcpy(to, data + i * stride, 2 * D) : memset(to, 0, 2 * D);
    }
    void transpose(size_t rows, int32_t *to, size_t line) const {  // -> (D / 2, rows), pairs along D
        for (size_t start = 0; start < rows; start += LANES)
            for (size_t d = 0; d < D / 2; d++)
                for (size_t i = start; i < start + LANES; i++)
                    to[d * line + i] = i < count ? read<int32_t>(data + i * stride + 2 * d) : 0;
    }
    void pair_rows(size_t rows, int32_t *to, size_t line) const {  // -> (rows / 2, D), pairs along the positions
        for (size_t i = 0; i < rows; i += 2, to += line)
            for (size_t d = 0; d < D; d += LANES) {
                Ints pairs = lanes(i, d) | lanes(i + 1, d) << 16;
                memcpy(to + d, &pairs, sizeof pairs);
            }
    }
    Ints lanes(size_t position, size_t d) const {
        if (position >= count) return Ints{};
        const uint16_t *bf16 = data + position * stride + d;
        return __builtin_convertvector(D - d >= LANES ? read<Halves>(bf16) : read<Halves>(bf16, 2 * (D - d)), Ints);
    }
};

void write(const float *from, size_t line, size_t rows, size_t D, uint16_t *to, size_t stride) {
    for (size_t i = 0; i < rows; i++)
        for (size_t d = 0; d < D; d += LANES) store(to + i * stride + d, load(from + i * line + d), D - d);
}

template <size_t... I> constexpr Ints numbered(std::index_sequence<I...>) { return Ints{int32_t(I)...}; }
inline Floats first_lanes(Floats x, int count, float others) {
    constexpr Ints LANE = numbered(Lanes{});
    return LANE < count ? x : Floats{} + others;
}

// ---- one head of one batch row

template <class T> struct Scratch {  // uninitialised memory
    std::unique_ptr<T[]> memory;
    explicit Scratch(size_t count) : memory(new T[count]) {}
    operator T *() const { return memory.get(); }
};

struct Head {
    const Attention &call;
    size_t D = call.width, T = call.positions, C = call.heads * D, stride = 3 * C;
    size_t columns = round_up(D, LANES);
    size_t keys = round_up(T, LANES) + LANES;  // the length of a line; not a power of two: lines would share cache sets
    size_t both = call.d_out ? 1 : 0;          // what only the backward pass needs is empty in the forward pass
    float scale = 1 / std::sqrt(float(D));
    Scratch<float> S{ROWS * keys}, dP{both * ROWS * keys}, sums{ROWS * columns};
    Scratch<float> dK{both * keys * columns}, dV{both * keys * columns};
    Scratch<uint16_t> P{BLOCK * keys}, dS{both * BLOCK * keys};
    Scratch<int32_t> Q{BLOCK * D / 2}, dO{both * BLOCK * D / 2};
    Scratch<int32_t> K_transposed{D / 2 * keys}, V_transposed{both * D / 2 * keys};
    Scratch<int32_t> paired_rows{keys / 2 * columns};  // V in the forward pass, K in the backward pass
    Scratch<int32_t> Q_paired{both * BLOCK / 2 * columns}, dO_paired{both * BLOCK / 2 * columns};
    Scratch<int32_t> P_paired{both * BLOCK / 2 * keys}, dS_paired{both * BLOCK / 2 * keys};
    Positions q, k, v, o, d_o;
    uint16_t *out, *d_q;
    float *log_sums;

    explicit Head(const Attention &call) : call(call) {}

    void run(size_t row, size_t head) {
        size_t start = row * T * C + head * D, qkv_start = row * T * stride + head * D;
        q = {call.qkv + qkv_start, stride, T, D}, k = q, v = q;
        k.data += C, v.data += 2 * C;
        out = call.out + start, o = {out, C, T, D}, log_sums = call.log_sums + (row * call.heads + head) * T;
        if (!call.d_out) return forward();
        d_o = {call.d_out + start, C, T, D}, d_q = call.d_qkv + qkv_start;
        backward();
    }

    void forward() {
        k.transpose(round_up(T, LANES), K_transposed, keys);
        v.pair_rows(round_up(T, LANES), paired_rows, columns);
        for (size_t first = 0; first < T; first += ROWS) {
            size_t end = round_up(std::min(first + ROWS, T), LANES), count = std::min<size_t>(ROWS, T - first);
            q.from(first).copy(ROWS, Q);
            product({Q, D / 2, 1}, {K_transposed, keys}, D / 2, end, false, S, keys);
            for (size_t i = 0; i < ROWS; i++) {
                float log_sum = softmax(S + i * keys, first + i + 1, end, P + i * keys);
                if (i < count) log_sums[first + i] = log_sum;
            }
            product({(int32_t *)+P, keys / 2, 1}, {paired_rows, columns}, end / 2, columns, false, sums, columns);
            write(sums, columns, count, D, out + first * C, C);
        }
    }

    // Writes the weights of the first `seen` of `end` scores, and 0 for the others. Returns the scores' log-sum-exp.
    float softmax(float *scores, int seen, int end, uint16_t *weights) const {
        Floats most = Floats{} - INFINITY, sum = {};
        for (int j = 0; j < end; j += LANES) {
            Floats x = first_lanes(load(scores + j) * scale, seen - j, -INFINITY);
            store(scores + j, x);
            most = greater(most, x);
        }
        float row_max = greatest(most);
        for (int j = 0; j < end; j += LANES) {  // a nan shows in the sum
            Floats x = first_lanes(exp(load(scores + j) - row_max), seen - j, 0);
            store(scores + j, x);
            sum += x;
        }
        float row_sum = total(sum), inverse = 1 / row_sum;
        for (int j = 0; j < end; j += LANES) store(weights + j, load(scores + j) * inverse);
        return row_max + std::log(row_sum);
    }

    void backward() {
        memset(dK, 0, keys * columns * sizeof(float));
        memset(dV, 0, keys * columns * sizeof(float));
        k.transpose(round_up(T, LANES), K_transposed, keys);
        v.transpose(round_up(T, LANES), V_transposed, keys);
        k.pair_rows(round_up(T, LANES), paired_rows, columns);
        for (size_t start = 0; start < T; start += BLOCK) {
            size_t count = round_up(std::min(BLOCK, T - start), ROWS);
            size_t last = round_up(std::min(start + BLOCK, T), LANES);
            q.from(start).copy(count, Q), q.from(start).pair_rows(count, Q_paired, columns);
            d_o.from(start).copy(count, dO), d_o.from(start).pair_rows(count, dO_paired, columns);
            for (size_t first = 0; first < count; first += ROWS) queries_backward(start, first, last);
            Positions{P, keys, count, last}.pair_rows(count, P_paired, keys);
            Positions{dS, keys, count, last}.pair_rows(count, dS_paired, keys);
            for (size_t j = 0; j < last; j += ROWS) keys_backward(start, j, count / 2);
        }
        write(dK, columns, T, D, d_q + C, stride);
        write(dV, columns, T, D, d_q + 2 * C, stride);
    }

    // Computes P, dS and dQ of the ROWS queries from `first` on of the block that begins at `start`. P and dS become 0
    // from the first key after these queries to `last`.
    void queries_backward(size_t start, size_t first, size_t last) {
        size_t position = start + first, end = round_up(std::min(position + ROWS, T), LANES);
        product({Q + first * D / 2, D / 2, 1}, {K_transposed, keys}, D / 2, end, false, S, keys);
        product({dO + first * D / 2, D / 2, 1}, {V_transposed, keys}, D / 2, end, false, dP, keys);
        for (size_t i = 0; i < ROWS; i++) {
            uint16_t *p = P + (first + i) * keys, *ds = dS + (first + i) * keys;
            query_backward(position + i, S + i * keys, dP + i * keys, p, ds, end);
            memset(p + end, 0, (last - end) * sizeof *p);
            memset(ds + end, 0, (last - end) * sizeof *ds);
        }
        product({(int32_t *)(dS + first * keys), keys / 2, 1}, {paired_rows, columns}, end / 2, columns, false, sums,
                columns);
        write(sums, columns, std::min<size_t>(ROWS, T - position), D, d_q + position * stride, stride);
    }

    // Computes the first `end` elements of a row of P and of dS.
    void query_backward(size_t position, const float *s, const float *dp, uint16_t *p, uint16_t *ds, int end) const {
        float log_sum = 0, mean = 0;  // mean: the row sum of dO * O, which is that of P * dP
        int seen = 0;
        if (position < T) {
            Floats products = {};
            for (size_t d = 0; d < D; d += LANES)
                products += load(d_o.data + position * C + d, D - d) * load(o.data + position * C + d, D - d);
            seen = int(position + 1), log_sum = log_sums[position], mean = total(products);
        }
        for (int j = 0; j < end; j += LANES) {
            Floats weight = first_lanes(exp(load(s + j) * scale - log_sum), seen - j, 0);
            store(p + j, weight);
            store(ds + j, weight * (load(dp + j) - mean) * scale);
        }
    }

    // Adds to dK and dV of the ROWS keys from j on what the `pairs` pairs of queries of a block give.
    void keys_backward(size_t start, size_t j, int pairs) {
        int before = j > start ? (j - start) / 2 : 0;  // pairs of queries that stand before these keys
        size_t at = before * keys + j, row = before * columns, to = j * columns;
        product({dS_paired + at, 1, keys}, {Q_paired + row, columns}, pairs - before, columns, true, dK + to, columns);
        product({P_paired + at, 1, keys}, {dO_paired + row, columns}, pairs - before, columns, true, dV + to, columns);
    }
};

}  // namespace

// Computes the forward pass, or the backward pass if there are gradients. Returns 0, or -1 if memory runs out.
extern "C" int64_t gpt_causal_attention(const Attention *call) try {
    std::vector<Head> heads;
    for (int64_t thread = 0; thread < call->threads; thread++) heads.emplace_back(*call);
    threads::share(call->threads, call->rows * call->heads, 1, [&](int thread, int begin, int end) {
        for (int i = begin; i < end; i++) heads[thread].run(i / call->heads, i % call->heads);
    });
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}
