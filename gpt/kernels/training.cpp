// What a training step does besides products and attention: GELU and its gradient, losses of logits and their gradient.
// An element or a row is the work of one thread, so threads make no difference to the result.
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

struct Gelu {  // as gpt/kernels/training.py declares it
    int64_t count, is_half, threads;
    const void *x, *upstream;  // upstream: the gradient of `out`'s place; null in the forward pass
    void *out;
};
struct Losses {  // likewise; logits are (rows, padded), losses (rows)
    int64_t rows, vocabulary, padded, is_half, gradient, threads;
    void *logits;  // `gradient`: become it
    const int64_t *targets;
    float *losses;
};

template <class T> void gelu(const Gelu &g) {
    const T *x = (const T *)g.x, *upstream = (const T *)g.upstream;
    T *out = (T *)g.out;
#pragma omp parallel for num_threads(g.threads)
    for (int64_t i = 0; i < g.count; i += LANES) {
        int count = std::min<int64_t>(g.count - i, LANES);
        Floats value = load(x + i, count);
        if (!upstream) {
            store(out + i, gelu(value), count);
            continue;
        }
        Floats square = value * value;
        Floats share = 1.0f / (1.0f + exp(value * (square * -GELU_3 - GELU_1)));  // gelu(x) = x share
        Floats slope = share + value * share * (1.0f - share) * (square * (3 * GELU_3) + GELU_1);
        store(out + i, load(upstream + i, count) * slope, count);
    }
}

template <class T> float largest_of(const T *row, int64_t count) {
    Floats most = Floats{} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) most = greater(most, load(row + i));
    float largest = greatest(most);
    for (; i < count; i++) largest = std::max(largest, load(row + i, 1)[0]);
    return largest;
}

template <class T> void losses(const Losses &l) {
    const int64_t V = l.vocabulary, whole = V / LANES * LANES;
#pragma omp parallel for num_threads(l.threads)
    for (int64_t r = 0; r < l.rows; r++) {
        T *row = (T *)l.logits + r * l.padded;
        float largest = largest_of(row, V), at_target = load(row + l.targets[r], 1)[0];
        static thread_local std::vector<float> scratch;
        scratch.resize(l.padded);
        float *powers = scratch.data();
        Floats sums = {};  // nan shows here
        for (int64_t i = 0; i < whole; i += LANES) {
            Floats power = exp(load(row + i) - largest);
            store(powers + i, power);
            sums += power;
        }
        float sum = total(sums);
        for (int64_t i = whole; i < V; i++) sum += powers[i] = exp(load(row + i, 1) - largest)[0];
        l.losses[r] = largest - at_target + std::log(sum);
        if (!l.gradient) continue;
        float inverse = 1 / sum;
        powers[l.targets[r]] -= sum;
        for (int64_t i = 0; i < V; i += LANES) {
            int count = std::min<int64_t>(V - i, LANES);
            store(row + i, load(powers + i, count) * inverse, count);
        }
        memset(row + V, 0, (l.padded - V) * sizeof(T));
    }
}

}  // namespace

extern "C" bool gpt_has_threads() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

extern "C" void gpt_gelu(const Gelu *g) { g->is_half ? gelu<uint16_t>(*g) : gelu<float>(*g); }

extern "C" void gpt_losses(const Losses *l) { l->is_half ? losses<uint16_t>(*l) : losses<float>(*l); }
