// The kinds of weights, float, fp16, bf16 and int8: how their products with a token's inputs are summed up on this CPU.
//
// A kind has
//     Weight                  a weight in memory
//     Vector, Input           WIDTH weights and as many inputs in registers
//     Sum                     the running sum of a token and a row
//     bytes, prepare, input   inputs of a token -> memory of `bytes` bytes -> registers
//     start, finish           begin and end of the sum of SPAN inputs, whose memory is SPAN_BYTES long
//     TOKENS, UNROLLED        tokens in a tile of 4 rows; whether its loop is unrolled; found by trial
#pragma once
#include "vectors.h"

namespace {

template <class T> inline T read_up_to(const void *from, size_t bytes) {
    return bytes >= sizeof(T) ? read<T>(from) : read<T>(from, bytes);
}

struct Fp32 {
    using Weight = float;
    using Vector = Floats;
    using Input = Floats;
    using Sum = Floats;
    static constexpr size_t WIDTH = LANES, SPAN = SIZE_MAX, SPAN_BYTES = 0;  // one span
    static constexpr int TOKENS = 4;
    static constexpr bool UNROLLED = LANES < 16;
    static size_t bytes(size_t width) { return 4 * width; }
    static void prepare(const float *x, size_t width, uint8_t *to) { memcpy(to, x, 4 * width); }
    static Vector weights(const float *from, size_t count = WIDTH) { return load(from, count); }
    static Input input(const uint8_t *span, size_t k) { return read<Input>(span + 4 * k); }
    static Sum start(const uint8_t *) { return Sum{}; }
    static void multiply(Sum &sum, Input input, Vector weight) { sum = multiply_add(input, weight, sum); }
    static Floats finish(Floats, Sum sum, const uint8_t *) { return sum; }
};

struct Fp16 : Fp32 {
    using Weight = Half;
    static Vector weights(const Half *from, size_t count = WIDTH) { return load(from, count); }
};

#ifdef __AVX512BF16__
struct Bf16 : Fp32 {  // rounds the inputs to bf16 too: twice as many products per instruction
    using Weight = uint16_t;
    using Vector = __m512bh;
    using Input = __m512bh;
    static constexpr size_t WIDTH = 2 * LANES;
    static constexpr int TOKENS = 4;
    static size_t bytes(size_t width) { return 2 * width; }
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (size_t k = 0; k < width; k += LANES) store((uint16_t *)to + k, load(x + k));
    }
    static Vector weights(const uint16_t *from, size_t count = WIDTH) { return read_up_to<Vector>(from, 2 * count); }
    static Input input(const uint8_t *span, size_t k) { return read<Input>(span + 2 * k); }
    static void multiply(Sum &sum, Input input, Vector weight) {  // GCC 12 would copy the sum of the intrinsic
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(input), "v"(weight));
    }
};
#else
struct Bf16 : Fp32 {  // of each pair of weights, one is a float after a shift, the other after masking
    using Weight = uint16_t;
    using Vector = Ints;
    struct Input { Floats even, odd; };
    static constexpr size_t WIDTH = 2 * LANES;
    static constexpr int TOKENS = 4;
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (size_t k = 0; k < width; k += WIDTH)
            for (size_t i = 0; i < WIDTH; i++) ((float *)to)[k + i % 2 * LANES + i / 2] = x[k + i];
    }
    static Vector weights(const uint16_t *from, size_t count = WIDTH) { return read_up_to<Vector>(from, 2 * count); }
    static Input input(const uint8_t *span, size_t k) {
        return {read<Floats>(span + 4 * k), read<Floats>(span + 4 * (k + LANES))};
    }
    static void multiply(Sum &sum, const Input &input, Vector weight) {
        sum = multiply_add(input.even, (Floats)(weight << 16), sum);
        sum = multiply_add(input.odd, (Floats)(weight & -65536), sum);
    }
};
#endif

// ---- int8
//
// Inputs are rounded to int8 too, with one scale for each span of 256 inputs, as large values often stand alone:
//     sum of a span = scale * sum(weight * input)                    the sum is exact
// VNNI's instruction multiplies unsigned by signed bytes and adds four products to an int32. With it a lane computes
//     scale * (sum((weight + 128) * input) - sum((0 + 128) * input))
// The instruction is written as assembly, since GCC 12 would copy the sums of its intrinsic.

typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

#if (defined(__AVX512VNNI__) && defined(__AVX512F__)) || defined(__AVXVNNI__)
using Int8Weights = Ints;
inline Int8Weights int8_weights(Ints bytes) { return bytes ^ int32_t(0x80808080); }  // + 128
inline void add_products(Ints &sum, Int8Weights weight, Ints input) {
#ifdef __AVX512F__
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(input));
#else
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weight), "x"(input));
#endif
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct Int8Weights { __m256i value, magnitude; };
inline Int8Weights int8_weights(Ints bytes) { return {(__m256i)bytes, _mm256_abs_epi8((__m256i)bytes)}; }
inline void add_products(Ints &sum, const Int8Weights &weight, Ints input) {  // the input gets the weight's sign
    __m256i pairs = _mm256_maddubs_epi16(weight.magnitude, _mm256_sign_epi8((__m256i)input, weight.value));
    sum += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
using Int8Weights = int8x16_t;
inline Int8Weights int8_weights(Ints bytes) { return (int8x16_t)bytes; }
inline void add_products(Ints &sum, Int8Weights weight, Ints input) {
#ifdef __ARM_FEATURE_DOTPROD
    sum = (Ints)vdotq_s32((int32x4_t)sum, weight, (int8x16_t)input);
#else
    int16x8_t pairs = vmull_s8(vget_low_s8(weight), vget_low_s8((int8x16_t)input));
    sum = (Ints)vpadalq_s16((int32x4_t)sum, vmlal_high_s8(pairs, weight, (int8x16_t)input));
#endif
}
#else
struct Int8Weights { Shorts even, odd; };
inline Int8Weights int8_weights(Ints bytes) { return {(Shorts)bytes << 8 >> 8, (Shorts)bytes >> 8}; }
inline void add_products(Ints &sum, const Int8Weights &weight, Ints bytes) {
    Int8Weights input = int8_weights(bytes);
    Ints pairs = (Ints)(weight.even * input.even + weight.odd * input.odd);
    sum += (pairs << 16 >> 16) + (pairs >> 16);
}
#endif

struct Int8 {
    using Weight = int8_t;
    using Vector = Int8Weights;
    using Input = Ints;
    using Sum = Ints;
    static constexpr size_t WIDTH = 4 * LANES, SPAN = 256;
    static constexpr int TOKENS = 4;
    static constexpr bool UNROLLED = LANES < 8;  // with AVX2, tiles of 4 tokens become slower
    struct Span {
        int8_t inputs[SPAN];
        Ints offset;  // start of each lane's sum: with VNNI -sum(128 * input), else 0
        Floats scale;
    };
    static constexpr size_t SPAN_BYTES = sizeof(Span);
    static size_t bytes(size_t width) { return (width + SPAN - 1) / SPAN * SPAN_BYTES; }
    static void prepare(const float *x, size_t width, uint8_t *to) {
        for (auto *span = (Span *)to; width; span++) {
            size_t count = std::min(width, SPAN);
            round(x, count, *span);
            x += count, width -= count;
        }
    }
    static void round(const float *x, size_t count, Span &span) {
        Floats most = {};
        for (size_t k = 0; k < count; k += LANES) {
            Ints size = (Ints)load(x + k) & 0x7fffffff;
            most = (Floats)(size > (Ints)most ? size : (Ints)most);  // inf and nan have more bits than all numbers
        }
        int32_t bits = 0;
        for (int lane = 0; lane < LANES; lane++) bits = std::max(bits, ((Ints)most)[lane]);
        float scale = read<float>(&bits) / 127, inverse = scale > 0 ? 1.0f / scale : 0.0f;
        for (size_t k = 0; k < count; k++) {
            float shifted = x[k] * inverse + 12582912.0f;  // + 1.5 * 2^23: the nearest whole number in the lowest bits
            span.inputs[k] = int8_t(read<int32_t>(&shifted));
        }
        Ints products = {};
        for (size_t k = 0; k < count; k += WIDTH)
            add_products(products, int8_weights(Ints{}), read<Input>(span.inputs + k));
        span.offset = -products;
        span.scale = Floats{} + scale;
    }
    static Vector weights(const int8_t *from, size_t count = WIDTH) {
        return int8_weights(read_up_to<Ints>(from, count));
    }
    static Input input(const uint8_t *span, size_t k) { return read<Input>(((const Span *)span)->inputs + k); }
    static Sum start(const uint8_t *span) { return ((const Span *)span)->offset; }
    static void multiply(Sum &sum, Input input, const Vector &weight) { add_products(sum, weight, input); }
    static Floats finish(Floats before, Sum sum, const uint8_t *span) {
        return multiply_add(__builtin_convertvector(sum, Floats), ((const Span *)span)->scale, before);
    }
};

// ---- prompts
//
// For many tokens the time is that of the products. Of 16 registers, 12 hold the sums of 3 tokens, 3 their inputs, and
// one the weights of one row after another. For few tokens, tiles of 4 are faster although some sums are in memory.

template <class Kind> struct InRegisters : Kind {
    static constexpr int TOKENS = 3;
    static Floats weights(const typename Kind::Weight *from, size_t count = LANES) {
        return in_register(Kind::weights(from, count));
    }
    static Floats input(const uint8_t *span, size_t k) { return in_register(Kind::input(span, k)); }
};
template <class Kind> struct Prompt { using Type = Kind; };
template <> struct Prompt<Fp32> { using Type = std::conditional_t<REGISTERS < 32, InRegisters<Fp32>, Fp32>; };
template <> struct Prompt<Fp16> { using Type = std::conditional_t<REGISTERS < 32, InRegisters<Fp16>, Fp16>; };

#ifndef __AVX512BF16__
struct Bf16Prompt : Bf16 {
    using Vector = Input;
    static constexpr int TOKENS = 3;
    static constexpr bool UNROLLED = false;
    static Vector weights(const uint16_t *from, size_t count = WIDTH) {
        Ints pairs = Bf16::weights(from, count);
        return {in_register((Floats)(pairs << 16)), in_register((Floats)(pairs & -65536))};
    }
    static void multiply(Sum &sum, const Input &input, const Vector &weight) {
        sum = multiply_add(input.even, weight.even, sum);
        sum = multiply_add(input.odd, weight.odd, sum);
    }
};
template <> struct Prompt<Bf16> { using Type = std::conditional_t<REGISTERS < 32, Bf16Prompt, Bf16>; };
#endif

}  // namespace
