// Products of a few tokens' inputs with a weight matrix in float, bf16 or int8: x @ weight.T + bias.
//
// For few tokens the time is that of reading the weights from memory, so every weight is read once. The rows of the
// matrix (the outputs) are shared among the threads:
//
//     for each stripe of 4 rows:                    8 for a single token
//         for each tile of up to 4 tokens:          the first reads the weights from memory, the others from the cache
//             for k in steps of WIDTH inputs:
//                 sums[token][row] += inputs[token][k..] * weight[row][k..]          in 16 lanes each
//             out[token][row] = total of the lanes * scale[row] + bias[row]          scale: of int8 weights
//
// Int8 where the CPU has vpdpbusd, which multiplies unsigned by signed bytes and adds four products to an int32: the
// inputs are rounded to int8 too, with one scale for each span of 256 inputs, as large values often stand alone.
//     sum of a span = scale * (sum((weight + 128) * input) - 128 * sum(input))       in the parentheses exact
#pragma once
#include <atomic>
#include <thread>
#include <utility>

#include "vectors.h"

namespace {

constexpr int STRIPES_AHEAD = 2;  // the distance at which weights are fetched from memory: with 1 they come late

struct Matrix {  // as native_model.py declares it
    const void *weight;         // (rows, width)
    const float *scale, *bias;  // (rows,) or null; only int8 has scales
};

// ---- kinds of weights
//
// Weight: a weight in memory. Vector: WIDTH weights or inputs in a register. Sum: the running sum of a token and a row.
// prepare() turns the inputs of a token into `bytes` bytes, which inputs() reads. start() and finish() frame the sum of
// SPAN inputs. Two instructions are written as such, since GCC 12 would copy the sums of their intrinsics.

template <class T> struct Plain {  // converts weights to float, 16 at a time
    using Weight = T;
    using Vector = Floats;
    using Sum = Floats;
    static constexpr size_t WIDTH = LANES, SPAN = SIZE_MAX;
    static size_t bytes(size_t width) { return 4 * width; }
    static void prepare(const float *x, size_t width, uint8_t *to) { memcpy(to, x, 4 * width); }
    static Vector weights(const T *from, size_t count = WIDTH) {
        if constexpr (sizeof(T) == 1)
            return __builtin_convertvector(count >= WIDTH ? read<Bytes>(from) : read<Bytes>(from, count), Floats);
        else
            return load(from, count);
    }
    static Vector inputs(const uint8_t *row, size_t k) { return read<Vector>(row + 4 * k); }
    static Sum start(const uint8_t *, size_t) { return Sum{}; }
    static void multiply(Sum &sum, Vector input, Vector weight) { sum = multiply_add(input, weight, sum); }
    static Floats finish(Floats, Sum sum, const uint8_t *, size_t) { return sum; }
};

using Fp32 = Plain<float>;
#ifdef __AVX512BF16__
struct Bf16 : Plain<uint16_t> {  // rounds the inputs to bf16 too: twice as many products per instruction
    using Vector = __m512bh;
    static constexpr size_t WIDTH = 32;
    static size_t bytes(size_t width) { return 2 * width; }
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (size_t k = 0; k < width; k += LANES) store((uint16_t *)to + k, load(x + k));
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
struct Int8 {
    using Weight = int8_t;
    using Vector = __m512i;
    using Sum = __m512i;
    static constexpr size_t WIDTH = 64, SPAN = 256;
    struct Span {
        int8_t inputs[SPAN];
        __m512i offset;  // -128 * sum of the inputs, in 16 lanes
        __m512 scale;
    };
    static size_t bytes(size_t width) { return (width + SPAN - 1) / SPAN * sizeof(Span); }
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (auto *span = (Span *)to; width; span++) {
            size_t count = std::min(width, SPAN);
            Ints most = {};  // bits of the greatest magnitude; inf and nan are greater than all numbers
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
        return _mm512_xor_si512(read, _mm512_set1_epi8(-128));  // weight + 128, unsigned
    }
    static const Span &span(const uint8_t *row, size_t k) { return ((const Span *)row)[k / SPAN]; }
    static Vector inputs(const uint8_t *row, size_t k) { return read<Vector>(span(row, k).inputs + k % SPAN); }
    static Sum start(const uint8_t *row, size_t k) { return span(row, k).offset; }
    static void multiply(Sum &sum, Vector input, Vector weight) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(input));
    }
    static Floats finish(Floats before, Sum sum, const uint8_t *row, size_t k) {
        return (Floats)_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), span(row, k).scale, (__m512)before);
    }
};
#else
using Int8 = Plain<int8_t>;
#endif

// ---- the threads of one call

struct Team {
    int thread, threads;
    std::atomic<int> *arrived, *round;

    void wait() const {  // a barrier. OpenMP's own may sleep at once, and is woken late
        if (threads == 1) return;
        int now = round->load(std::memory_order_acquire);
        if (arrived->fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived->store(0, std::memory_order_relaxed);
            round->store(now + 1, std::memory_order_release);
        }
        for (int spins = 0; round->load(std::memory_order_acquire) == now; spins++) {
            if (spins > 2000) std::this_thread::yield();  // there may be more threads than cores
#ifdef __SSE2__
            _mm_pause();
#endif
        }
    }
};

// ---- products

struct Inputs {  // of N tokens, prepared
    uint8_t *data;
    size_t stride;  // bytes from token to token
};
struct Output {  // (N, rows)
    float *data;
    size_t stride;
    bool adds;  // adds to what is there, instead of overwriting it
};

// Returns the totals of ROWS weight rows times TOKENS inputs, in lane token * ROWS + row. For one token it reads the
// rows one after another, which is fastest from memory; for more, all at once, which loads the inputs less often. I are
// the numbers of the sums: GCC 12 keeps sums in registers only if their numbers are constants.
template <class Kind, int ROWS, int TOKENS, size_t... I>
__attribute__((noinline)) Floats tile(const typename Kind::Weight *weight, size_t width, const uint8_t *input,
                                      size_t stride, std::index_sequence<I...>) {
    constexpr int TOGETHER = TOKENS == 1 ? 1 : ROWS, BYTES = sizeof(typename Kind::Weight);
    Floats results[TOKENS * ROWS + (TOKENS == 3 ? ROWS : 0)] = {};  // a power of two
    const char *ahead = (const char *)(weight + STRIPES_AHEAD * ROWS * width);
    for (int first = 0; first < ROWS; first += TOGETHER) {
        Floats spans[sizeof...(I)] = {};
        for (size_t begin = 0, end; begin < width; begin = end) {
            end = begin + std::min(Kind::SPAN, width - begin);
            typename Kind::Sum sums[] = {Kind::start(input + I / TOGETHER * stride, begin)...};
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
            ((spans[I] = Kind::finish(spans[I], sums[I], input + I / TOGETHER * stride, begin)), ...);
        }
        ((results[first + I] = spans[I]), ...);
    }
    return ::totals<sizeof results / sizeof *results>(results);
}

// Computes the outputs of the weight rows [first, first + ROWS) for the tokens from `token` on, in tiles of TOKENS.
// Returns the first token that is left.
template <class Kind, int ROWS, int TOKENS>
int stripe(const Matrix &m, int first, size_t width, const Inputs &x, int token, int tokens, const Output &out) {
    const auto *weight = (const typename Kind::Weight *)m.weight + first * width;
    constexpr auto numbers = std::make_index_sequence<TOKENS == 1 ? 1 : TOKENS * ROWS>{};
    for (; token + TOKENS <= tokens; token += TOKENS) {
        Floats sums = tile<Kind, ROWS, TOKENS>(weight, width, x.data + token * x.stride, x.stride, numbers);
        for (int i = 0; i < TOKENS * ROWS; i++) {
            int row = first + i % ROWS;
            float y = (m.scale ? sums[i] * m.scale[row] : sums[i]) + (m.bias ? m.bias[row] : 0.0f);
            float *to = out.data + (token + i / ROWS) * out.stride + row;
            *to = out.adds ? y + *to : y;
        }
    }
    return token;
}

// Computes this thread's share of the rows of x @ weight.T + bias, for all tokens.
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
