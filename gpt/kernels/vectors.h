// Vectors of floats as wide as the CPU's registers: reading, writing, bf16 and fp16, fused multiply-add, sums in a
// fixed order, exp and GELU. The vector types are extensions of GCC and clang, which translate them into the CPU's
// instructions.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

namespace {

// Wider vectors than the CPU's become slow code, with GCC 12 even scalar code.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__SSE2__)
constexpr int LANES = 4, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;  // as NEON
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));  // the bits of LANES numbers in bf16 or fp16
struct Half { uint16_t bits; };  // the type of a number in fp16; the type of a number in bf16 is uint16_t
using Lanes = std::make_index_sequence<LANES>;

inline size_t round_up(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// ---- memory; with a `count`, only so many lanes are read or written

template <class T> inline T read(const void *from, int bytes = sizeof(T)) {  // the bytes that are not read become 0
    T value = {};
    memcpy(&value, from, bytes);
    return value;
}
inline Floats widen_bf16(Halves x) {  // bf16 -> float; a bf16 is the upper half of a float
#ifdef __AVX512F__                    // GCC 12 turns the line below into five instructions
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
    return (Floats)(__builtin_convertvector(x, Ints) << 16);
#endif
}
inline Halves narrow_bf16(Floats x) {  // float -> nearest bf16, ties to even
#ifdef __AVX512BF16__
    auto half = _mm512_cvtneps_pbh((__m512)x);  // values below 1e-38 become 0
    return read<Halves>(&half);
#endif
    Ints bits = (Ints)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Halves);
}
inline Floats widen_fp16(Halves x) {  // fp16 -> float
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)x);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Floats)vcvt_f32_f16((float16x4_t)x);
#else
    // size: exponent and mantissa, in the bits where a float has them
    Ints bits = __builtin_convertvector(x, Ints), size = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    Ints normal = size + (112 << 23);  // the exponent of a float is larger by 112
    Ints subnormal = (Ints)((Floats)(size + (113 << 23)) - 0x1p-14f);  // (2^-14 + mantissa * 2^-24) - 2^-14
    return (Floats)(sign | (size < 1 << 23 ? subnormal : size >= 31 << 23 ? size | 0x7f800000 : normal));
#endif
}
inline Halves narrow_fp16(Floats x) {  // float -> nearest fp16, ties to even, infinite from 65520 on
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Halves)vcvt_f16_f32((float32x4_t)x);
#else
    Ints size = (Ints)x & 0x7fffffff, sign = ((Ints)x >> 16) & 0x8000;      // size: exponent and mantissa
    Ints normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;  // a tie is rounded up if bit 13 is 1
    Ints subnormal = (Ints)((Floats)size + 0.5f) - 0x3f000000;  // the sum is rounded to a multiple of 2^-24
    Ints large = x == x ? Ints{} + 0x7c00 : Ints{} + 0x7e00;
    return __builtin_convertvector(sign | (size < 113 << 23 ? subnormal : size < 143 << 23 ? normal : large), Halves);
#endif
}
inline Floats load(const float *from, int count = LANES) {
    return count >= LANES ? read<Floats>(from) : read<Floats>(from, 4 * count);
}
inline Floats load(const uint16_t *from, int count = LANES) {
    return widen_bf16(count >= LANES ? read<Halves>(from) : read<Halves>(from, 2 * count));
}
inline Floats load(const Half *from, int count = LANES) {
    return widen_fp16(count >= LANES ? read<Halves>(from) : read<Halves>(from, 2 * count));
}
inline void store(float *to, Floats x, int count = LANES) {
    count >= LANES ? memcpy(to, &x, sizeof x) : memcpy(to, &x, 4 * count);
}
inline void store(uint16_t *to, Floats x, int count = LANES) {
    Halves half = narrow_bf16(x);
    count >= LANES ? memcpy(to, &half, sizeof half) : memcpy(to, &half, 2 * count);
}
inline void store(Half *to, Floats x, int count = LANES) {
    Halves half = narrow_fp16(x);
    count >= LANES ? memcpy(to, &half, sizeof half) : memcpy(to, &half, 2 * count);
}

// ---- arithmetic

// Keeps x in a register: GCC 12 would read it from memory again for each product with it.
template <class Vector> inline Vector in_register(Vector x) {
#ifdef __AVX__
    asm("" : "+v"(x));
#endif
    return x;
}

// Returns a * b + c. With -ffp-contract=off the compiler fuses nothing itself: it would do so in some loops only, and
// the same sum would round differently in another tile.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
// Returns the lane of (a, b), seen as 2 * LANES lanes, that lane `i` of the result of add_neighbours begins with.
template <int STEP> constexpr int neighbour(int i) {
    return i % (LANES / 2) / STEP * 2 * STEP + i % STEP + (i < LANES / 2 ? 0 : LANES);
}
// Adds to each lane its neighbour STEP lanes further on. Returns the sums of a, then those of b.
template <int STEP, size_t... I> inline Floats add_neighbours(Floats a, Floats b, std::index_sequence<I...>) {
    return PICK(a, b, neighbour<STEP>(I)...) + PICK(a, b, (neighbour<STEP>(I) + STEP)...);
}
// Returns the sum of the lanes of x[i] in lane i, for COUNT vectors (a power of two, at most LANES); overwrites x. The
// order of the additions is always the same.
template <int COUNT, int STEP = LANES / 2> inline Floats totals(Floats *x) {
    constexpr int LEFT = COUNT > 1 ? COUNT / 2 : 1;
    for (int i = 0; i < LEFT; i++) x[i] = add_neighbours<STEP>(x[2 * i], x[COUNT > 1 ? 2 * i + 1 : 0], Lanes{});
    if constexpr (STEP > 1) return totals<LEFT, STEP / 2>(x);
    return x[0];
}
inline float total(Floats x) { return totals<1>(&x)[0]; }

inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }  // of nan and a number: either
inline float greatest(Floats x) {
    float result = x[0];
    for (int lane = 1; lane < LANES; lane++) result = std::max(result, x[lane]);
    return result;
}

// Replaces each x by e^x; relative error 2e-7, nan stays nan. The polynomial is that of Cephes. The vectors take each
// step together, so that the CPU need not wait for the result of one.
template <int COUNT> inline void exponentials(Floats (&x)[COUNT]) {
    Floats power[COUNT], sum[COUNT];
    auto each = [](auto step) { for (int i = 0; i < COUNT; i++) step(i); };
    each([&](int i) { x[i] = x[i] < -87.0f ? Floats{} - 87.0f : x[i] > 88.0f ? Floats{} + 88.0f : x[i]; });
    each([&](int i) { power[i] = (x[i] * 1.44269504f + 12582912.0f) - 12582912.0f; });  // + 1.5 * 2^23 rounds
    each([&](int i) { x[i] = multiply_add(power[i], Floats{} - 0.693359375f, x[i]); });
    each([&](int i) { x[i] = multiply_add(power[i], Floats{} + 2.12194440e-4f, x[i]); });
    each([&](int i) { sum[i] = Floats{} + 1.9875691500e-4f; });
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        each([&](int i) { sum[i] = multiply_add(sum[i], x[i], Floats{} + factor); });
    each([&](int i) { x[i] = multiply_add(sum[i], x[i] * x[i], x[i]) + 1.0f; });
    each([&](int i) { x[i] *= (Floats)((__builtin_convertvector(power[i], Ints) + 127) << 23); });  // * 2^power
}
inline Floats exp(Floats x) {
    Floats one[] = {x};
    exponentials(one);
    return one[0];
}

constexpr float GELU_1 = 1.59576912f, GELU_3 = 0.0713548163f;  // 2 u = GELU_1 x + GELU_3 x^3
inline Floats gelu(Floats x) {                                 // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
    return x / (1.0f + exp(x * (x * x * -GELU_3 - GELU_1)));
}

}  // namespace
