// Vectors of 16 floats: reading, writing, bf16, fused multiply-add, sums in a fixed order, exp and GELU.
// The vector types are extensions of GCC and clang, which translate them into the instructions of the CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));  // takes several registers where these are narrower
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));  // 16 bf16; a bf16 is the upper half of a float
typedef int8_t Bytes __attribute__((vector_size(16)));

constexpr int LANES = 16;

inline size_t round_up(size_t count, size_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// ---- memory; with a `count`, only so many lanes are read or written

template <class T> inline T read(const void *from, int bytes = sizeof(T)) {  // the bytes that are not read become 0
    T value = {};
    memcpy(&value, from, bytes);
    return value;
}
inline Floats widen(Halves x) {  // bf16 -> float
#ifdef __AVX512F__               // GCC 12 turns the line below into five instructions
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#else
    return (Floats)(__builtin_convertvector(x, Ints) << 16);
#endif
}
inline Halves narrow(Floats x) {  // float -> nearest bf16, ties to even
#ifdef __AVX512BF16__
    auto half = _mm512_cvtneps_pbh((__m512)x);  // values below 1e-38 become 0
    return read<Halves>(&half);
#endif
    Ints bits = (Ints)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Halves);
}
inline Floats load(const float *from, int count = LANES) {
    return count >= LANES ? read<Floats>(from) : read<Floats>(from, 4 * count);
}
inline Floats load(const uint16_t *from, int count = LANES) {
    return widen(count >= LANES ? read<Halves>(from) : read<Halves>(from, 2 * count));
}
inline void store(float *to, Floats x, int count = LANES) {
    count >= LANES ? memcpy(to, &x, 64) : memcpy(to, &x, 4 * count);
}
inline void store(uint16_t *to, Floats x, int count = LANES) {
    Halves half = narrow(x);
    count >= LANES ? memcpy(to, &half, 32) : memcpy(to, &half, 2 * count);
}

// ---- arithmetic

// Returns a * b + c. With -ffp-contract=off the compiler fuses nothing itself: it would do so in some loops only, and
// the same sum would round differently in another tile.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    struct Parts { __m256 low, high; };
    Parts x = read<Parts>(&a), y = read<Parts>(&b), z = read<Parts>(&c);
    Parts sums = {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
    return read<Floats>(&sums);
#else
    return a * b + c;
#endif
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
// Adds to each lane its neighbour 8, 4, 2 or 1 lanes (stage 0 to 3) further on. Returns the sums of a, then those of b.
template <int STAGE> inline Floats add_neighbours(Floats a, Floats b) {
    if (STAGE == 0)
        return PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    if (STAGE == 1)
        return PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    if (STAGE == 2)
        return PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
// Returns the sum of the lanes of x[i] in lane i, for COUNT vectors (a power of two); overwrites x. The order of the
// additions is always the same.
template <int COUNT, int STAGE = 0> inline Floats totals(Floats *x) {
    constexpr int LEFT = COUNT > 1 ? COUNT / 2 : 1;
    for (int i = 0; i < LEFT; i++) x[i] = add_neighbours<STAGE>(x[2 * i], COUNT > 1 ? x[2 * i + 1] : x[2 * i]);
    if constexpr (STAGE < 3) return totals<LEFT, STAGE + 1>(x);
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
