// Causal attention over whole sequences in bf16 or fp32, and its gradient, as in FlashAttention (Dao et al. 2022,
// arXiv:2205.14135) on a CPU. One thread computes a head of a batch row alone, so the number of threads changes no bit.
//
// Shapes: B batch rows, T positions, H heads, D width of a head, even in bf16. For one head Q, K, V, O and their
// gradients are (T, D); S = Q K^T * scale, the weights P = softmax(S), dP and dS are (T, T) and exist for a few
// queries at a time.
//
// Forward, for each tile of 4 queries and all keys up to the last of them:
//     S = Q K^T * scale, -inf after the query's own position
//     log_sum = row max of S + log(row sum of exp(S - row max))      kept for the backward pass
//     P = exp(S - row max) / row sum                                 rounded to the type of Q
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
// In bf16, products are sums of pairs, as vdpbf16ps computes them: an int32 holds two bf16 that follow each other along
// the dimension that is summed over, the first in its lower half. In fp32 a unit is one float in place of such a pair.
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
    int64_t rows, positions, heads, width, threads, is_bf16;
    const void *qkv;    // (B, T, 3, H, D)
    void *out;          // (B, T, H, D)
    float *log_sums;    // (B, H, T)
    const void *d_out;  // gradients; null in the forward pass
    void *d_qkv;
};

// ---- kinds of numbers: an Element in memory; PER of them are a Unit, which a product takes at a time

struct Bf16 {
    using Element = uint16_t;
    using Unit = int32_t;
    using Units = Ints;
    static constexpr size_t PER = 2;
    static void multiply(Floats &sum, Ints a, Ints b) {
#ifdef __AVX512BF16__
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
        sum = multiply_add((Floats)(a << 16), (Floats)(b << 16), sum);
        sum = multiply_add((Floats)(a & -65536), (Floats)(b & -65536), sum);
#endif
    }
};

struct Fp32 {
    using Element = float;
    using Unit = float;
    using Units = Floats;
    static constexpr size_t PER = 1;
    static void multiply(Floats &sum, Floats a, Floats b) { sum = multiply_add(a, b, sum); }
};

// ---- products of matrices of units

template <class Kind> struct Left {  // element (row, unit) at row * stride + unit * step
    const typename Kind::Unit *data;
    size_t stride, step;
};
template <class Kind> struct Right {  // element (unit, column) at unit * stride + column
    const typename Kind::Unit *data;
    size_t stride;
};

template <int COUNT, class Kind, size_t... I>  // COUNT vectors of columns. I: the numbers of the sums
void tile(Left<Kind> a, Right<Kind> b, int units, bool adds, float *c, size_t stride, std::index_sequence<I...>) {
    using Units = typename Kind::Units;
    Floats sums[sizeof...(I)] = {};
    for (int unit = 0; unit < units; unit++) {
        Units left, right[COUNT];
        for (int v = 0; v < COUNT; v++) right[v] = in_register(read<Units>(b.data + unit * b.stride + v * LANES));
        auto multiply = [&](Floats &sum, int row, int v) {
            // Subtracting broadcasts the unit. The compiler leaves out x - 0; not x + 0, as -0 + 0 is 0.
            if (v == 0) left = in_register(a.data[row * a.stride + unit * a.step] - Units{});
            Kind::multiply(sum, left, right[v]);
        };
        (multiply(sums[I], I / COUNT, I % COUNT), ...);
    }
    auto put = [&](float *to, Floats sum) { store(to, adds ? load(to) + sum : sum); };
    (put(c + I / COUNT * stride + I % COUNT * LANES, sums[I]), ...);
}

// Computes a (ROWS, units) @ b (units, columns) into c (ROWS, stride), or adds it; columns are a multiple of LANES.
template <class Kind, int COUNT = VECTORS>
void product(Left<Kind> a, Right<Kind> b, int units, int columns, bool adds, float *c, size_t stride) {
    constexpr int WIDTH = COUNT * LANES;
    for (; columns >= WIDTH; columns -= WIDTH, b.data += WIDTH, c += WIDTH)
        tile<COUNT>(a, b, units, adds, c, stride, std::make_index_sequence<ROWS * COUNT>{});
    if constexpr (COUNT > 1) product<Kind, COUNT - 1>(a, b, units, columns, adds, c, stride);
}

// ---- the layouts of a head's queries, keys, values and gradients

template <class Kind> struct Positions {  // `count` positions of D elements each; those after the last are read as 0
    using Element = typename Kind::Element;
    using Unit = typename Kind::Unit;
    static constexpr size_t PER = Kind::PER;
    const Element *data;
    size_t stride, count, D;

    Positions from(size_t start) const { return {data + start * stride, stride, count - std::min(start, count), D}; }
    void copy(size_t rows, Unit *to) const {  // -> (rows, D / PER)
        for (size_t i = 0; i < rows; i++, to += D / PER)
            i < count ? memcpy(to, data + i * stride, D * sizeof(Element)) : memset(to, 0, D * sizeof(Element));
    }
    void transpose(size_t rows, Unit *to, size_t line) const {  // -> (D / PER, rows), units along D
        for (size_t start = 0; start < rows; start += LANES)
            for (size_t d = 0; d < D / PER; d++)
                for (size_t i = start; i < start + LANES; i++)
                    to[d * line + i] = i < count ? read<Unit>(data + i * stride + PER * d) : 0;
    }
    void unite_rows(size_t rows, Unit *to, size_t line) const {  // -> (rows / PER, D), units along the positions
        for (size_t i = 0; i < rows; i += PER, to += line)
            for (size_t d = 0; d < D; d += LANES)
                if constexpr (PER == 2) {
                    Ints pairs = lanes(i, d) | lanes(i + 1, d) << 16;
                    memcpy(to + d, &pairs, sizeof pairs);
                } else
                    store(to + d, i < count ? load(data + i * stride + d, D - d) : Floats{});
    }
    Ints lanes(size_t position, size_t d) const {
        if (position >= count) return Ints{};
        const Element *at = data + position * stride + d;
        return __builtin_convertvector(D - d >= LANES ? read<Halves>(at) : read<Halves>(at, 2 * (D - d)), Ints);
    }
};

template <class Element>
void write(const float *from, size_t line, size_t rows, size_t D, Element *to, size_t stride) {
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

template <class Kind> struct Head {
    using Element = typename Kind::Element;
    using Unit = typename Kind::Unit;
    static constexpr size_t PER = Kind::PER;
    const Attention &call;
    size_t D = call.width, T = call.positions, C = call.heads * D, stride = 3 * C;
    size_t columns = round_up(D, LANES);
    size_t keys = round_up(T, LANES) + LANES;  // the length of a line; not a power of two: lines would share cache sets
    size_t both = call.d_out ? 1 : 0;          // what only the backward pass needs is empty in the forward pass
    size_t pairs = both * (PER - 1);           // and what only pairs need
    float scale = 1 / std::sqrt(float(D));
    Scratch<float> S{ROWS * keys}, dP{both * ROWS * keys}, sums{ROWS * columns};
    Scratch<float> dK{both * keys * columns}, dV{both * keys * columns};
    Scratch<Element> P{BLOCK * keys}, dS{both * BLOCK * keys};
    Scratch<Unit> Q{BLOCK * D / PER}, dO{both * BLOCK * D / PER};
    Scratch<Unit> K_transposed{D / PER * keys}, V_transposed{both * D / PER * keys};
    Scratch<Unit> united_rows{keys / PER * columns};  // V in the forward pass, K in the backward pass
    Scratch<Unit> Q_united{both * BLOCK / PER * columns}, dO_united{both * BLOCK / PER * columns};
    Scratch<Unit> P_united{pairs * BLOCK / PER * keys}, dS_united{pairs * BLOCK / PER * keys};
    Positions<Kind> q, k, v, o, d_o;
    Element *out, *d_q;
    float *log_sums;

    explicit Head(const Attention &call) : call(call) {}

    void run(size_t row, size_t head) {
        size_t start = row * T * C + head * D, qkv_start = row * T * stride + head * D;
        q = {(const Element *)call.qkv + qkv_start, stride, T, D}, k = q, v = q;
        k.data += C, v.data += 2 * C;
        out = (Element *)call.out + start, o = {out, C, T, D}, log_sums = call.log_sums + (row * call.heads + head) * T;
        if (!call.d_out) return forward();
        d_o = {(const Element *)call.d_out + start, C, T, D}, d_q = (Element *)call.d_qkv + qkv_start;
        backward();
    }

    void forward() {
        k.transpose(round_up(T, LANES), K_transposed, keys);
        v.unite_rows(round_up(T, LANES), united_rows, columns);
        for (size_t first = 0; first < T; first += ROWS) {
            size_t end = round_up(std::min(first + ROWS, T), LANES), count = std::min<size_t>(ROWS, T - first);
            q.from(first).copy(ROWS, Q);
            product<Kind>({Q, D / PER, 1}, {K_transposed, keys}, D / PER, end, false, S, keys);
            for (size_t i = 0; i < ROWS; i++) {
                float log_sum = softmax(S + i * keys, first + i + 1, end, P + i * keys);
                if (i < count) log_sums[first + i] = log_sum;
            }
            product<Kind>({(const Unit *)+P, keys / PER, 1}, {united_rows, columns}, end / PER, columns, false, sums,
                          columns);
            write(sums, columns, count, D, out + first * C, C);
        }
    }

    // Writes the weights of the first `seen` of `end` scores, and 0 for the others. Returns the scores' log-sum-exp.
    float softmax(float *scores, int seen, int end, Element *weights) const {
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
        k.unite_rows(round_up(T, LANES), united_rows, columns);
        for (size_t start = 0; start < T; start += BLOCK) {
            size_t count = round_up(std::min(BLOCK, T - start), ROWS);
            size_t last = round_up(std::min(start + BLOCK, T), LANES);
            q.from(start).copy(count, Q), q.from(start).unite_rows(count, Q_united, columns);
            d_o.from(start).copy(count, dO), d_o.from(start).unite_rows(count, dO_united, columns);
            for (size_t first = 0; first < count; first += ROWS) queries_backward(start, first, last);
            const Unit *p = united(P, P_united, count, last), *ds = united(dS, dS_united, count, last);
            for (size_t j = 0; j < last; j += ROWS) keys_backward(p, ds, start, j, count / PER);
        }
        write(dK, columns, T, D, d_q + C, stride);
        write(dV, columns, T, D, d_q + 2 * C, stride);
    }

    // Returns a block of P or dS as (queries / PER, keys) units along the queries.
    const Unit *united(const Element *block, Unit *to, size_t count, size_t last) const {
        if constexpr (PER == 1) return block;
        Positions<Kind>{block, keys, count, last}.unite_rows(count, to, keys);
        return to;
    }

    // Computes P, dS and dQ of the ROWS queries from `first` on of the block that begins at `start`. P and dS become 0
    // from the first key after these queries to `last`.
    void queries_backward(size_t start, size_t first, size_t last) {
        size_t position = start + first, end = round_up(std::min(position + ROWS, T), LANES);
        product<Kind>({Q + first * D / PER, D / PER, 1}, {K_transposed, keys}, D / PER, end, false, S, keys);
        product<Kind>({dO + first * D / PER, D / PER, 1}, {V_transposed, keys}, D / PER, end, false, dP, keys);
        for (size_t i = 0; i < ROWS; i++) {
            Element *p = P + (first + i) * keys, *ds = dS + (first + i) * keys;
            query_backward(position + i, S + i * keys, dP + i * keys, p, ds, end);
            memset(p + end, 0, (last - end) * sizeof *p);
            memset(ds + end, 0, (last - end) * sizeof *ds);
        }
        const Unit *ds = (const Unit *)(dS + first * keys);
        product<Kind>({ds, keys / PER, 1}, {united_rows, columns}, end / PER, columns, false, sums, columns);
        write(sums, columns, std::min<size_t>(ROWS, T - position), D, d_q + position * stride, stride);
    }

    // Computes the first `end` elements of a row of P and of dS.
    void query_backward(size_t position, const float *s, const float *dp, Element *p, Element *ds, int end) const {
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

    // Adds to dK and dV of the ROWS keys from j on what the `units` units of queries of a block give.
    void keys_backward(const Unit *p, const Unit *ds, size_t start, size_t j, int units) {
        int before = j > start ? (j - start) / PER : 0;  // units of queries that stand before these keys
        size_t at = before * keys + j, row = before * columns, to = j * columns;
        product<Kind>({ds + at, 1, keys}, {Q_united + row, columns}, units - before, columns, true, dK + to, columns);
        product<Kind>({p + at, 1, keys}, {dO_united + row, columns}, units - before, columns, true, dV + to, columns);
    }
};

template <class Kind> void run(const Attention &call) {
    std::vector<Head<Kind>> heads;
    for (int64_t thread = 0; thread < call.threads; thread++) heads.emplace_back(call);
    threads::share(call.threads, call.rows * call.heads, 1, [&](int thread, int begin, int end) {
        for (int i = begin; i < end; i++) heads[thread].run(i / call.heads, i % call.heads);
    });
}

}  // namespace

// Computes the forward pass, or the backward pass if there are gradients. Returns 0, or -1 if memory runs out.
extern "C" int64_t gpt_causal_attention(const Attention *call) try {
    call->is_bf16 ? run<Bf16>(*call) : run<Fp32>(*call);
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}
