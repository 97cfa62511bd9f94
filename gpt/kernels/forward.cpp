// GPT-2 on a CPU: one call runs the whole model over a few tokens, each with its own row and position of a KV cache.
//
// Shapes: N tokens of this call, C width, F = 4 C, H heads, D = C / H, S positions of the cache, V vocabulary.
// Weights are (outputs, inputs) row by row, as nn.Linear holds them. All activations are float.
//
// The same token gives the same bits whatever other tokens are in the call and however many threads work: every sum is
// 16 running sums over the inputs, in order, added up in one fixed tree, and belongs to one thread.
#include <cmath>
#include <memory>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "products.h"

namespace {

// ---- as gpt/kernels/native_model.py declares them

struct Layer {
    const float *norm_1, *shift_1, *norm_2, *shift_2;
    Matrix qkv, proj, fc, out;
};
struct Model {
    int64_t kind, layers, heads, width, positions, vocabulary;
    const Layer *layer;
    Matrix token;
    const float *position, *norm, *shift;
};
struct Cache {
    int64_t is_half, rows, positions;
    void *const *keys, *const *values;  // of each layer: (rows, H, S, D)
};
struct Batch {
    int64_t tokens, outputs, threads;
    const int64_t *ids, *rows, *places, *which;  // which: the tokens whose logits are wanted
    float *logits;                               // (outputs, V)
};

// ---- attention of QUERIES tokens of one row, at consecutive places from `place`, in one head. scores: (QUERIES, S)

template <class T, int QUERIES, int COLUMNS>
void attend(const float *q, size_t stride, const T *keys, const T *values, int place, int D, float *scores, int S,
            float *out) {
    float scale = 1.0f / std::sqrt(float(D)), inverse[QUERIES];
    prefetch(values, size_t(place + QUERIES) * D);
    prefetch(keys + size_t(S) * D, size_t(place + QUERIES) * D);  // of the next head
    for (int start = 0; start < place + QUERIES; start += LANES) {
        Floats part[QUERIES][LANES] = {};
        for (int i = 0; i < std::min(LANES, place + QUERIES - start); i++)
            for (int d = 0; d < D; d += LANES) {
                Floats key = load(keys + size_t(start + i) * D + d, D - d);
                for (int query = 0; query < QUERIES; query++)
                    part[query][i] = multiply_add(load(q + query * stride + d, D - d), key, part[query][i]);
            }
        for (int query = 0; query < QUERIES; query++)
            store(scores + query * S + start, totals<LANES>(part[query]) * scale);
    }
    for (int query = 0; query < QUERIES; query++) {
        float *score = scores + query * S, most = score[0];
        int count = place + query + 1;
        for (int i = 1; i < count; i++) most = score[i] > most ? score[i] : most;
        Floats sum = {};
        for (int i = 0; i < count; i += LANES) {
            Floats weight = exp(load(score + i, count - i) - most);
            store(score + i, weight, count - i);
            sum += load(score + i, count - i);
        }
        inverse[query] = 1.0f / total(sum);
    }
    for (int d = 0; d < D; d += COLUMNS * LANES) {
        Floats sum[QUERIES][COLUMNS] = {};
        auto add = [&](int query, int at) {
            for (int c = 0; c < COLUMNS; c++)
                sum[query][c] = multiply_add(load(values + size_t(at) * D + d + c * LANES, COLUMNS > 1 ? LANES : D - d),
                                             Floats{} + scores[query * S + at], sum[query][c]);
        };
        for (int at = 0; at <= place; at++)
            for (int query = 0; query < QUERIES; query++) add(query, at);
        for (int query = 1; query < QUERIES; query++)
            for (int at = place + 1; at <= place + query; at++) add(query, at);
        for (int query = 0; query < QUERIES; query++)
            for (int c = 0; c < COLUMNS; c++)
                store(out + query * stride + d + c * LANES, sum[query][c] * inverse[query],
                      COLUMNS > 1 ? LANES : D - d);
    }
}

// ---- the model

inline size_t padded(size_t count) {
    return (count + PADDING - 1) / PADDING * PADDING;
}

void normalise(const float *x, const float *scale, const float *shift, int C, float *out) {
    Floats sum = {}, squares = {};
    for (int c = 0; c < C; c += LANES) sum += load(x + c, C - c);
    float mean = total(sum) / C;
    for (int c = 0; c < C; c += LANES) {
        Floats far = load(x + c, C - c) - mean;
        for (int i = C - c; i < LANES; i++) far[i] = 0;
        squares += far * far;
    }
    float inverse = 1.0f / std::sqrt(total(squares) / C + EPSILON);
    for (int c = 0; c < C; c += LANES)
        store(out + c, (load(x + c, C - c) - mean) * inverse * load(scale + c, C - c) + load(shift + c, C - c), C - c);
}

template <class Kind, class T> struct Run {
    const Model &model;
    const Cache &cache;
    const Batch &batch;
    float *x, *mixed, *wide, *scores;  // (N, C), (N, 3 C), (N, F), (threads, GROUP, S), all but x padded
    Inputs inputs;
    const int N = batch.tokens, C = model.width, F = 4 * C, H = model.heads, D = C / H, S = cache.positions;
    const size_t WIDE = padded(F);

    T *cached(void *of_layer, size_t row, size_t head, size_t place) const {
        return (T *)of_layer + ((row * H + head) * S + place) * D;
    }
    template <class Work> void each(const Team &team, int count, Work work) const {
        for (int i = team.thread; i < count; i += team.threads) work(i);
        team.wait();
    }
    void prepare(int token, int width) const {  // the padding is 0: it meets weights of the next row
        std::fill(wide + token * WIDE + width, wide + token * WIDE + padded(width), 0.0f);
        Kind::prepare(wide + token * WIDE, padded(width), inputs.data + token * inputs.stride);
    }
    void embed(int token) const {
        const auto *weight = (const typename Kind::Weight *)model.token.weight + batch.ids[token] * C;
        float scale = model.token.scale ? model.token.scale[batch.ids[token]] : 1.0f;
        for (int c = 0; c < C; c++) {
            float value = sizeof(*weight) == 2 ? widen(Halves{} + uint16_t(weight[c]))[0] : float(weight[c]);
            x[token * C + c] = value * scale + model.position[batch.places[token] * C + c];
        }
    }
    void append(int token, int layer) const {  // the new keys and values to the cache
        for (int head = 0; head < H; head++)
            for (int which = 1; which < 3; which++) {
                const float *from = mixed + token * WIDE + which * C + head * D;
                void *of_layer = (which == 1 ? cache.keys : cache.values)[layer];
                T *to = cached(of_layer, batch.rows[token], head, batch.places[token]);
                for (int d = 0; d < D; d += LANES) store(to + d, load(from + d, D - d), D - d);
            }
    }
    void attention(const Team &team, int layer) const {
        float *own = scores + size_t(team.thread) * GROUP * padded(S);
        int work = 0;
        for (int token = 0, size; token < N; token += size) {
            size = 1;
            while (size < GROUP && token + size < N && batch.rows[token + size] == batch.rows[token] &&
                   batch.places[token + size] == batch.places[token] + size)
                size++;
            if (size < GROUP) size = 1;
            for (int head = 0; head < H; head++) {
                if (work++ % team.threads != team.thread) continue;
                T *keys = cached(cache.keys[layer], batch.rows[token], head, 0);
                T *values = cached(cache.values[layer], batch.rows[token], head, 0);
                auto *function = D % PADDING ? (size == 1 ? attend<T, 1, 1> : attend<T, GROUP, 1>)
                                             : (size == 1 ? attend<T, 1, 4> : attend<T, GROUP, 4>);
                size_t at = token * WIDE + head * D;
                function(mixed + at, WIDE, keys, values, batch.places[token], D, own, padded(S), wide + at);
            }
        }
        team.wait();
    }
    void block(const Team &team, int number) const {
        const Layer &layer = model.layer[number];
        auto ready = [&](int width) { each(team, N, [&](int token) { prepare(token, width); }); };
        auto normed = [&](const float *scale, const float *shift) {
            each(team, N, [&](int token) {
                normalise(x + token * C, scale, shift, C, wide + token * WIDE);
                prepare(token, C);
            });
        };
        normed(layer.norm_1, layer.shift_1);
        product<Kind>(team, layer.qkv, 3 * C, C, inputs, N, {mixed, WIDE, false});
        team.wait();
        each(team, N, [&](int token) { append(token, number); });
        attention(team, number);
        ready(C);
        product<Kind>(team, layer.proj, C, C, inputs, N, {x, size_t(C), true});
        team.wait();
        normed(layer.norm_2, layer.shift_2);
        product<Kind>(team, layer.fc, F, C, inputs, N, {wide, WIDE, false});
        team.wait();
        each(team, N, [&](int token) {
            float *row = wide + token * WIDE;
            for (int f = 0; f < F; f += LANES) store(row + f, gelu(load(row + f, F - f)), F - f);
            prepare(token, F);
        });
        product<Kind>(team, layer.out, C, F, inputs, N, {x, size_t(C), true});
        team.wait();
    }
    void all(const Team &team) const {
        each(team, N, [&](int token) { embed(token); });
        for (int layer = 0; layer < model.layers; layer++) block(team, layer);
        each(team, batch.outputs, [&](int output) {
            normalise(x + batch.which[output] * C, model.norm, model.shift, C, wide + output * WIDE);
            prepare(output, C);
        });
        product<Kind>(team, model.token, model.vocabulary, C, inputs, batch.outputs,
                      {batch.logits, size_t(model.vocabulary), false});
    }
};

template <class Kind, class T> int run(const Model &model, const Cache &cache, const Batch &batch) {
    size_t N = batch.tokens, C = model.width, wide = padded(4 * C), threads = batch.threads;
    size_t bytes = Kind::bytes(wide);
    size_t count = N * (C + 2 * wide) + N * bytes / 4 + threads * GROUP * padded(cache.positions) + 5 * PADDING;
    std::unique_ptr<float[]> memory(new (std::nothrow) float[count]);
    if (!memory) return -1;
    float *at = (float *)((uintptr_t(memory.get()) + 63) / 64 * 64);
    Run<Kind, T> run{model, cache, batch, at + N * 2 * wide, at, at + N * wide, nullptr, {}};
    run.inputs = {(uint8_t *)(run.x + padded(N * C)), bytes};
    run.scores = (float *)(run.inputs.data + N * bytes);
    std::atomic<int> arrived{0}, round{0};
#pragma omp parallel num_threads(threads)
    {
        Team team{0, 1, &arrived, &round};
#ifdef _OPENMP
        team.thread = omp_get_thread_num();
        team.threads = omp_get_num_threads();
#endif
        run.all(team);
    }
    return 0;
}

template <class Kind> int run(const Model &model, const Cache &cache, const Batch &batch) {
    return cache.is_half ? run<Kind, uint16_t>(model, cache, batch) : run<Kind, float>(model, cache, batch);
}

}  // namespace

// Returns 0; 1 + i where token i has an id, row or place that does not exist; -1 where memory ran out.
extern "C" int64_t gpt_forward(const Model *model, const Cache *cache, const Batch *batch) {
    for (int64_t i = 0; i < batch->tokens; i++) {
        auto within = [](int64_t value, int64_t end) { return value >= 0 && value < end; };
        if (!within(batch->ids[i], model->vocabulary) || !within(batch->rows[i], cache->rows) ||
            !within(batch->places[i], std::min(cache->positions, model->positions)))
            return i + 1;
    }
    if (model->kind == 0) return run<Fp32>(*model, *cache, *batch);
    return model->kind == 1 ? run<Bf16>(*model, *cache, *batch) : run<Int8>(*model, *cache, *batch);
}
