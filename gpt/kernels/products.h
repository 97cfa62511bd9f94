// Products of a few tokens with a weight matrix of float, bf16 or int8, shared out among threads.
#pragma once
#include <atomic>
#include <thread>
#include <utility>

#include "vectors.h"

namespace {

constexpr int TILES_AHEAD = 2;  // that weights are fetched from memory: with one, they come late

struct Matrix {  // scale, one per row, only of int8; no bias: null
    const void *weight;
    const float *scale, *bias;
};
// ---- kinds of weights: how inputs are prepared for a product, and how one vector of weights is multiplied. Two
// instructions stand as such, not as intrinsics: of those GCC 12 would move every sum to another register and back.

template <class T> struct Plain {  // float and bf16, and int8 where there is no better way: 16 weights at a time
    using Weight = T;
    using Vector = Floats;
    using Sum = Floats;
    static constexpr size_t WIDTH = LANES, SPAN = SIZE_MAX;  // SPAN: inputs that are summed before they are folded
    static size_t bytes(size_t width) { return 4 * width; }
    static void prepare(const float *x, size_t width, uint8_t *to) { memcpy(to, x, 4 * width); }
    static Vector weights(const T *from, size_t count = WIDTH) {
        if constexpr (sizeof(T) == 1)
            return __builtin_convertvector(count >= WIDTH ? read<Bytes>(from) : read<Bytes>(from, count), Floats);
        else
            return load(from, count);
    }
    static Vector inputs(const uint8_t *row, size_t k) { return read<Vector>(row + 4 * k); }
    static Sum begin(const uint8_t *, size_t) { return Sum{}; }
    static void multiply(Sum &sum, Vector input, Vector weight) { sum = multiply_add(input, weight, sum); }
    static Floats folded(Floats, Sum sum, const uint8_t *, size_t) { return sum; }
};

using Fp32 = Plain<float>;
#ifdef __AVX512BF16__
struct Bf16 : Plain<uint16_t> {  // the inputs are rounded to bf16 too: twice as many products per instruction
    using Vector = __m512bh;
    static constexpr size_t WIDTH = 32;
    static size_t bytes(size_t width) { return 2 * width; }
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (size_t k = 0; k < width; k += LANES) {
            Halves half = halve(load(x + k));
            memcpy(to + 2 * k, &half, 32);
        }
    }
    static Vector weights(const uint16_t *from, size_t count = WIDTH) {
        return count >= WIDTH ? read<Vector>(from) : read<Vector>(from, 2 * count);
    }
    static Vector inputs(const uint8_t *row, size_t k) { return read<Vector>(row + 2 * k); }
    static void multiply(Sum &sum, Vector input, Vector weight) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(input), "v"(weight));
    }
};
#else
using Bf16 = Plain<uint16_t>;
#endif
#ifdef __AVX512VNNI__
struct Int8 {  // the inputs are 8-bit integers too, with one scale for SPAN of them
    using Weight = int8_t;
    using Vector = __m512i;
    using Sum = __m512i;
    static constexpr size_t WIDTH = 64, SPAN = 256;
    struct Span {
        int8_t inputs[SPAN];
        __m512i offset;  // takes back what follows from weights being 128 too large, which makes them unsigned
        __m512 scale;
    };
    static size_t bytes(size_t width) { return (width + SPAN - 1) / SPAN * sizeof(Span); }
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (auto *span = (Span *)to; width; span++) {
            size_t count = std::min(width, SPAN);
            Ints most = {};  // as integers, so that inf and nan are the largest
            for (size_t k = 0; k < count; k += LANES) {
                Ints bits = (Ints)load(x + k) & 0x7fffffff;
                most = bits > most ? bits : most;
            }
            int32_t bits = _mm512_reduce_max_epi32((__m512i)most);
            float scale = read<float>(&bits) / 127, inverse = scale > 0 ? 1.0f / scale : 0.0f;
            span->scale = _mm512_set1_ps(scale);
            for (size_t k = 0; k < count; k += LANES) {
                __m512i nearest = _mm512_cvtps_epi32((__m512)(load(x + k) * inverse));
                _mm_storeu_si128((__m128i *)(span->inputs + k), _mm512_cvtepi32_epi8(nearest));
            }
            __m512i sums = {};
            for (size_t k = 0; k < count; k += WIDTH)
                sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(-128), read<__m512i>(span->inputs + k));
            span->offset = _mm512_sub_epi32(__m512i{}, sums);
            x += count, width -= count;
        }
    }
    static Vector weights(const int8_t *from, size_t count = WIDTH) {
        Vector read = count >= WIDTH ? ::read<Vector>(from) : ::read<Vector>(from, count);
        return _mm512_xor_si512(read, _mm512_set1_epi8(-128));  // 128 more, unsigned
    }
    static const Span &span(const uint8_t *row, size_t k) { return ((const Span *)row)[k / SPAN]; }
    static Vector inputs(const uint8_t *row, size_t k) { return read<Vector>(span(row, k).inputs + k % SPAN); }
    static Sum begin(const uint8_t *row, size_t k) { return span(row, k).offset; }
    static void multiply(Sum &sum, Vector input, Vector weight) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(input));
    }
    static Floats folded(Floats before, Sum sum, const uint8_t *row, size_t k) {
        return (Floats)_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), span(row, k).scale, (__m512)before);
    }
};
#else
using Int8 = Plain<int8_t>;
#endif

// ---- products

struct Inputs {  // N prepared rows
    uint8_t *data;
    size_t stride;  // bytes
};
struct Output {  // (N, rows): written or added to
    float *data;
    size_t stride;
    bool adds;
};

struct Team {  // the threads of one call
    int thread, threads;
    std::atomic<int> *arrived, *round;
    void wait() const {  // OpenMP's own barrier may sleep at once, and be woken late
        if (threads == 1) return;
        int now = round->load(std::memory_order_acquire);
        if (arrived->fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived->store(0, std::memory_order_relaxed);
            round->store(now + 1, std::memory_order_release);
        }
        for (int spins = 0; round->load(std::memory_order_acquire) == now; spins++) {
            if (spins > 2000) std::this_thread::yield();  // perhaps there are more threads than cores
#ifdef __SSE2__
            _mm_pause();
#endif
        }
    }
};

// The sums of ROWS weight rows times TOKENS inputs; lane token * ROWS + row. One after another the rows are read at the
// speed of memory, all at once the inputs are loaded less often. Only sums that have constant numbers, I, stay in
// registers: GCC 12 moves those of loops to and fro.
template <class Kind, int ROWS, int TOKENS, size_t... I>
__attribute__((noinline)) Floats tile(const typename Kind::Weight *weight, size_t width, const uint8_t *input,
                                      size_t stride, std::index_sequence<I...>) {
    constexpr int TOGETHER = TOKENS == 1 ? 1 : ROWS, BYTES = sizeof(typename Kind::Weight);
    Floats folded[TOKENS * ROWS + (TOKENS == 3 ? ROWS : 0)] = {};  // a power of two
    const char *ahead = (const char *)(weight + TILES_AHEAD * ROWS * width);
    for (int first = 0; first < ROWS; first += TOGETHER) {
        Floats totals[sizeof...(I)] = {};
        for (size_t begin = 0, end; begin < width; begin = end) {
            end = begin + std::min(Kind::SPAN, width - begin);
            typename Kind::Sum sums[] = {Kind::begin(input + I / TOGETHER * stride, begin)...};
            auto step = [&](size_t k, size_t count) __attribute__((always_inline)) {
                typename Kind::Vector rows[TOGETHER], inputs[TOKENS];
                for (int row = 0; row < TOGETHER; row++) {
                    rows[row] = Kind::weights(weight + (first + row) * width + k, count);
                    if (TOGETHER > 1 && k * BYTES % 64 == 0)
                        __builtin_prefetch(ahead + (row * width + k) * BYTES, 0, 2);
                }
                for (int token = 0; token < TOKENS; token++) inputs[token] = Kind::inputs(input + token * stride, k);
                (Kind::multiply(sums[I], inputs[I / TOGETHER], rows[I % TOGETHER]), ...);
            };
            size_t k = begin;
            for (; k + Kind::WIDTH <= end; k += Kind::WIDTH) step(k, Kind::WIDTH);
            if (k < end) step(k, end - k);
            ((totals[I] = Kind::folded(totals[I], sums[I], input + I / TOGETHER * stride, begin)), ...);
        }
        ((folded[first + I] = totals[I]), ...);
    }
    return ::totals<sizeof folded / sizeof *folded>(folded);
}

template <int ROWS, int TOKENS> inline Floats repeated(const float *from) {  // lane token * ROWS + row: from[row]
    float lanes[LANES] = {};
    for (int token = 0; token < TOKENS; token++) memcpy(lanes + token * ROWS, from, 4 * ROWS);
    return read<Floats>(lanes);
}

// Weight rows [first, first + ROWS) for TOKENS tokens at a time, from `token` on; returns the first one left.
template <class Kind, int ROWS, int TOKENS>
int stripe(const Matrix &m, int first, size_t width, const Inputs &x, int token, int tokens, const Output &out) {
    if (token + TOKENS > tokens) return token;
    const auto *weight = (const typename Kind::Weight *)m.weight + first * width;
    Floats scale = m.scale ? repeated<ROWS, TOKENS>(m.scale + first) : Floats{};
    Floats bias = m.bias ? repeated<ROWS, TOKENS>(m.bias + first) : Floats{};
    constexpr auto together = std::make_index_sequence<TOKENS == 1 ? 1 : TOKENS * ROWS>{};
    for (; token + TOKENS <= tokens; token += TOKENS) {
        Floats sums = tile<Kind, ROWS, TOKENS>(weight, width, x.data + token * x.stride, x.stride, together);
        sums = (m.scale ? sums * scale : sums) + bias;
        for (int i = 0; i < TOKENS; i++) {
            float *to = out.data + (token + i) * out.stride + first;
            float part[ROWS];
            memcpy(part, (const float *)&sums + i * ROWS, sizeof part);
            for (int row = 0; out.adds && row < ROWS; row++) part[row] += to[row];
            memcpy(to, part, sizeof part);
        }
    }
    return token;
}

// This thread's share of the rows of x @ weight.T + bias.
template <class Kind>
void product(const Team &team, const Matrix &m, int rows, size_t width, const Inputs &x, int tokens, Output out) {
    int shares = (rows + LANES - 1) / LANES;
    int row = int64_t(shares) * team.thread / team.threads * LANES;
    int end = std::min<int>(rows, int64_t(shares) * (team.thread + 1) / team.threads * LANES);
    for (; tokens == 1 && row + 8 <= end; row += 8) stripe<Kind, 8, 1>(m, row, width, x, 0, tokens, out);
    for (; row + 4 <= end; row += 4) {
        int token = stripe<Kind, 4, 4>(m, row, width, x, 0, tokens, out);
        token = stripe<Kind, 4, 3>(m, row, width, x, token, tokens, out);
        token = stripe<Kind, 4, 2>(m, row, width, x, token, tokens, out);
        stripe<Kind, 4, 1>(m, row, width, x, token, tokens, out);
    }
    for (; row < end; row++) stripe<Kind, 1, 1>(m, row, width, x, 0, tokens, out);
}

}  // namespace
