// GELU in its tanh form, in fp32, and its gradient, by an exponential: torch's tanh takes four times as long. With
// v = GELU_1 x + GELU_3 x^3 and s = 1 / (1 + exp(-v)):
//     gelu(x) = 0.5 x (1 + tanh(v / 2)) = x s
//     gelu'(x) = s + x s (1 - s) v'
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t PIECE = 4096;  // elements that a thread takes at a time

struct Gelu {  // as native_gelu.py declares it
    int64_t count, threads;
    const float *x, *d_out;  // d_out: the gradient of gelu(x), or null
    float *out;              // gelu(x), or the gradient of x if there is d_out
};

inline Floats slope(Floats x) {
    Floats damage = x - x;  // 0; nan of infinities and nan
    x = x > 100.0f ? Floats{} + 100.0f : x < -100.0f ? Floats{} - 100.0f : x;  // or x * x * GELU_3 would overflow
    Floats e = exp(x * (x * x * -GELU_3 - GELU_1)), s = 1.0f / (1.0f + e);
    return s + x * s * (e * s) * (x * x * (3 * GELU_3) + GELU_1) + damage;
}

}  // namespace

// Computes GELU or, if there is d_out, the gradient.
extern "C" void gpt_gelu(const Gelu *call) {
    int pieces = (call->count + PIECE - 1) / PIECE;
    threads::share(call->threads, pieces, 1, [&](int, int begin, int end) {
        int64_t last = std::min(end * PIECE, call->count);
        for (int64_t i = begin * PIECE; i < last; i += LANES) {
            int count = std::min<int64_t>(LANES, last - i);
            Floats x = load(call->x + i, count);
            store(call->out + i, call->d_out ? load(call->d_out + i, count) * slope(x) : gelu(x), count);
        }
    });
}
