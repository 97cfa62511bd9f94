// Products of a few tokens' inputs with a weight matrix in float, fp16, bf16 or int8: x @ weight.T + bias.
//
// For few tokens the time is that of reading the weights from memory, so every weight is read once. The rows of the
// matrix (the outputs) are shared among the threads:
//
//     for each stripe of 4 rows:                    8 for a single token
//         for each tile of some tokens:             the first reads the weights from memory, the others from the cache
//             for k in steps of WIDTH inputs:
//                 sums[row][token] += weight[row][k..] * inputs[token][k..]          in LANES lanes each
//             out[token][row] = total of the lanes * scale[row] + bias[row]          scale: of int8 weights
#pragma once
#include "team.h"
#include "weights.h"

namespace {

constexpr int STRIPES_AHEAD = 2;  // the distance at which weights are fetched from memory: with 1 they come late
constexpr bool BY_ROW = REGISTERS < 32;  // a tile loads the weights of a row just before they are multiplied

struct Matrix {  // as native_model.py declares it
    const void *weight;         // (rows, width)
    const float *scale, *bias;  // (rows,) or null; only int8 has scales
};
struct Inputs {  // of N tokens, prepared
    uint8_t *data;
    size_t stride;  // bytes from token to token
};
struct Output {  // (N, rows)
    float *data;
    size_t stride;
    bool adds;  // adds to what is there, instead of overwriting it
};

// Computes the products of ROWS weight rows and TOKENS inputs into out, (ROWS, TOKENS). For one token it goes through
// one row after another, which is fastest from memory; for more tokens it goes through all rows TOGETHER, which loads
// the inputs less often. The FIRST tile of a stripe has a later stripe fetched from memory. I are the numbers of the
// sums: GCC 12 keeps sums in registers only if their numbers are constants.
template <class Kind, int ROWS, int TOKENS, bool FIRST, size_t... I>
__attribute__((noinline)) void tile(const typename Kind::Weight *weight, size_t width, const uint8_t *input,
                                    size_t stride, float *out, std::index_sequence<I...>) {
    constexpr int TOGETHER = sizeof...(I) / TOKENS, BYTES = sizeof(typename Kind::Weight), COUNT = TOKENS * ROWS;
    constexpr int GROUP = std::min(LANES, COUNT == 12 ? 16 : COUNT);  // sums whose totals are made together
    Floats results[(COUNT + GROUP - 1) / GROUP * GROUP] = {};
    for (int first = 0; first < ROWS; first += TOGETHER) {
        Floats spans[sizeof...(I)] = {};
        const typename Kind::Weight *from = weight + first * width, *ahead = from + STRIPES_AHEAD * ROWS * width;
        const uint8_t *span = input;
        for (size_t left = width, count; left; left -= count, from += count, ahead += count, span += Kind::SPAN_BYTES) {
            count = std::min(Kind::SPAN, left);
            typename Kind::Sum sums[] = {Kind::start(span + I % TOKENS * stride)...};
            auto step = [&](size_t k, size_t count) __attribute__((always_inline)) {
                typename Kind::Vector rows[TOGETHER];
                typename Kind::Input inputs[TOKENS];
                auto read_row = [&](int row) __attribute__((always_inline)) {
                    rows[row] = Kind::weights(from + row * width + k, count);
                    if (FIRST && TOGETHER > 1 && k * BYTES % 64 == 0)
                        __builtin_prefetch(ahead + row * width + k, 0, 2);
                };
                auto multiply = [&](typename Kind::Sum &sum, int row, int token) __attribute__((always_inline)) {
                    if (BY_ROW && token == 0) read_row(row);
                    Kind::multiply(sum, inputs[token], rows[row]);
                };
                for (int row = 0; row < TOGETHER && !BY_ROW; row++) read_row(row);
                for (int token = 0; token < TOKENS; token++) inputs[token] = Kind::input(span + token * stride, k);
                (multiply(sums[I], I / TOKENS, I % TOKENS), ...);
            };
            size_t k = 0;
            if constexpr (Kind::UNROLLED)
#pragma GCC unroll 4
                for (; k + Kind::WIDTH <= count; k += Kind::WIDTH) step(k, Kind::WIDTH);
            else
                for (; k + Kind::WIDTH <= count; k += Kind::WIDTH) step(k, Kind::WIDTH);
            if (k < count) step(k, count - k);
            ((spans[I] = Kind::finish(spans[I], sums[I], span + I % TOKENS * stride)), ...);
        }
        ((results[first + I] = spans[I]), ...);
    }
    for (int i = 0; i < COUNT; i += GROUP) store(out + i, totals<GROUP>(results + i), COUNT - i);
}

// Computes the outputs of the weight rows [first, first + ROWS) for the tokens from `token` on, in tiles of TOKENS.
// Returns the first token that is left.
template <class Kind, int ROWS, int TOKENS, size_t... I>
int stripe(const Matrix &m, int first, size_t width, const Inputs &x, int token, int tokens, const Output &out,
           std::index_sequence<I...> numbers) {
    const auto *weight = (const typename Kind::Weight *)m.weight + first * width;
    for (; token + TOKENS <= tokens; token += TOKENS) {
        float sums[TOKENS * ROWS];
        auto *function = token ? tile<Kind, ROWS, TOKENS, false, I...> : tile<Kind, ROWS, TOKENS, true, I...>;
        function(weight, width, x.data + token * x.stride, x.stride, sums, numbers);
        for (int i = 0; i < TOKENS * ROWS; i++) {
            int row = first + i / TOKENS;
            float y = (m.scale ? sums[i] * m.scale[row] : sums[i]) + (m.bias ? m.bias[row] : 0.0f);
            float *to = out.data + (token + i % TOKENS) * out.stride + row;
            *to = out.adds ? y + *to : y;
        }
    }
    return token;
}

// The same for all tokens, in tiles of TOKENS, then of fewer.
template <class Kind, int ROWS, int TOKENS>
void stripes(const Matrix &m, int first, size_t width, const Inputs &x, int token, int tokens, const Output &out) {
    constexpr auto numbers = std::make_index_sequence<TOKENS == 1 ? 1 : TOKENS * ROWS>{};
    token = stripe<Kind, ROWS, TOKENS>(m, first, width, x, token, tokens, out, numbers);
    if constexpr (TOKENS > 1) stripes<Kind, ROWS, TOKENS - 1>(m, first, width, x, token, tokens, out);
}

// Computes x @ weight.T + bias for all tokens.
template <class Kind>
void product(int threads, const Matrix &m, int rows, size_t width, const Inputs &x, int tokens, const Output &out) {
    if constexpr (!std::is_same_v<Kind, typename Prompt<Kind>::Type>)
        if (tokens > 8) return product<typename Prompt<Kind>::Type>(threads, m, rows, width, x, tokens, out);
    threads::share(threads, rows, 16, [&](int, int row, int end) {
        for (; tokens == 1 && row + 8 <= end; row += 8) stripes<Kind, 8, 1>(m, row, width, x, 0, tokens, out);
        for (; row + 4 <= end; row += 4) stripes<Kind, 4, Kind::TOKENS>(m, row, width, x, 0, tokens, out);
        for (; row < end; row++) stripes<Kind, 1, 1>(m, row, width, x, 0, tokens, out);
    });
}

}  // namespace
