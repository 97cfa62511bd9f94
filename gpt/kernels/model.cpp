// GPT-2 on a CPU: one call runs the model over N tokens, each at a position of a row of a KV cache.
//
// A call, with the work that each line shares among the threads:
//     x = token[id] + position[its position]                         tokens
//     for each layer:
//         wide = norm_1(x)                                           tokens
//         mixed = wide @ qkv.T + bias                                outputs (rows of the matrix)
//         cache[row, position] = keys and values of mixed            tokens
//         wide = softmax(queries @ keys.T / sqrt(D)) @ values        heads of tokens
//         x += wide @ proj.T + bias                                  outputs
//         wide = norm_2(x)                                           tokens
//         wide = wide @ fc.T + bias                                  outputs
//         wide = gelu(wide)                                          tokens
//         x += wide @ out.T + bias                                   outputs
//     logits = norm(x) @ token.T                                     tokens, then outputs
//
// The bits of a token's results depend on nothing but its own row: neither on the other tokens of the call nor on the
// number of threads. One thread computes a whole sum, as running sums in the order of the inputs, one for each lane,
// that are then added up in a fixed order (vectors.h). How many tokens share a tile changes none of that.
//
// Shapes: N tokens, C width, F = 4 C, H heads, D = C / H, S positions of the cache, V vocabulary. Weights are (outputs,
// inputs), as in nn.Linear. All activations are float.
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "products.h"

namespace {

constexpr int GROUP = 4;     // tokens at consecutive positions of a row that share the reading of the cache
constexpr int COLUMNS = REGISTERS / 8;  // vectors of an output, of a group of tokens, that are summed at once
constexpr int PADDING = 64;  // floats; every row of activations is padded to a multiple of it
constexpr float EPSILON = 1e-5f;

// ---- as native_model.py declares them

struct Layer {
    const float *norm_1, *shift_1, *norm_2, *shift_2;
    Matrix qkv, proj, fc, out;
};
struct Model {
    int64_t kind, layers, heads, width, positions, vocabulary;  // kind: see KINDS there
    const Layer *layer;
    Matrix token;
    const float *position, *norm, *shift;
};
struct Cache {
    int64_t rows, capacity;
    void *const *keys, *const *values;  // of each layer: (rows, H, S, D)
};
struct Batch {
    int64_t tokens, outputs, threads;
    const int64_t *ids, *rows, *positions;  // (N,)
    const int64_t *wanted;               // (outputs,) the tokens whose logits are wanted
    float *logits;                       // (outputs, V)
};

// ---- attention

template <class T> inline void prefetch(const T *from, size_t count) {  // at most 4 KiB: the hardware goes on by itself
    for (size_t byte = 0; byte < std::min<size_t>(count * sizeof(T), 4096); byte += 64)
        __builtin_prefetch((const char *)from + byte, 0, 2);
}

// Computes one head of QUERIES tokens at consecutive positions from `position` on: q and out (QUERIES, stride), keys
// and values (capacity, D), memory for scores (QUERIES, line). Computes VECTORS vectors of an output at once; if that
// is more than one, D must be a multiple of their lanes.
template <class T, int QUERIES, int VECTORS>
void attend(const float *q, size_t stride, const T *keys, const T *values, int position, int D, int capacity,
            float *scores, int line, float *out) {
    float scale = 1.0f / std::sqrt(float(D)), inverse[QUERIES];
    prefetch(values, size_t(position + QUERIES) * D);
    prefetch(keys + size_t(capacity) * D, size_t(position + QUERIES) * D);  // of the next head
    for (int start = 0; start < position + QUERIES; start += LANES) {
        Floats sums[QUERIES][LANES] = {};
        for (int i = 0; i < std::min(LANES, position + QUERIES - start); i++)
            for (int d = 0; d < D; d += LANES) {
                int lanes = VECTORS > 1 ? LANES : D - d;
                Floats key = load(keys + size_t(start + i) * D + d, lanes);
                for (int query = 0; query < QUERIES; query++)
                    sums[query][i] = multiply_add(load(q + query * stride + d, lanes), key, sums[query][i]);
            }
        for (int query = 0; query < QUERIES; query++)
            store(scores + query * line + start, totals<LANES>(sums[query]) * scale);
    }
    for (int query = 0; query < QUERIES; query++) {
        float *score = scores + query * line, most = score[0];
        int count = position + query + 1;
        for (int i = 1; i < count; i++) most = score[i] > most ? score[i] : most;
        Floats sum = {};
        for (int i = 0; i < count; i += LANES) {
            Floats weight = exp(load(score + i, count - i) - most);
            store(score + i, weight, count - i);
            sum += load(score + i, count - i);
        }
        inverse[query] = 1.0f / total(sum);
    }
    for (int d = 0; d < D; d += VECTORS * LANES) {
        int lanes = VECTORS > 1 ? LANES : D - d;
        Floats sums[QUERIES][VECTORS] = {};
        auto add = [&](int query, int at) {
            for (int c = 0; c < VECTORS; c++)
                sums[query][c] = multiply_add(load(values + size_t(at) * D + d + c * LANES, lanes),
                                              Floats{} + scores[query * line + at], sums[query][c]);
        };
        for (int at = 0; at <= position; at++)
            for (int query = 0; query < QUERIES; query++) add(query, at);
        for (int query = 1; query < QUERIES; query++)
            for (int at = position + 1; at <= position + query; at++) add(query, at);
        for (int query = 0; query < QUERIES; query++)
            for (int c = 0; c < VECTORS; c++)
                store(out + query * stride + d + c * LANES, sums[query][c] * inverse[query], lanes);
    }
}

// ---- the model

void normalise(const float *x, const float *scale, const float *shift, int C, float *out) {
    Floats sum = {}, squares = {};
    for (int c = 0; c < C; c += LANES) sum += load(x + c, C - c);
    float mean = total(sum) / C;
    for (int c = 0; c < C; c += LANES) {
        Floats difference = load(x + c, C - c) - mean;
        for (int i = C - c; i < LANES; i++) difference[i] = 0;
        squares += difference * difference;
    }
    float inverse = 1.0f / std::sqrt(total(squares) / C + EPSILON);
    for (int c = 0; c < C; c += LANES)
        store(out + c, (load(x + c, C - c) - mean) * inverse * load(scale + c, C - c) + load(shift + c, C - c), C - c);
}

// One call. Kind: the kind of weights, see weights.h. T: the type of the cache.
template <class Kind, class T> struct Call {
    const Model &model;
    const Cache &cache;
    const Batch &batch;
    const int threads = batch.threads, N = batch.tokens, C = model.width, F = 4 * C, H = model.heads, D = C / H;
    const int S = cache.capacity;
    const size_t WIDE = round_up(F, PADDING), SCORES = round_up(S, PADDING);
    const std::unique_ptr<Floats[]> memory{new Floats[(3 * N * WIDE + batch.threads * GROUP * SCORES) / LANES]};
    float *const mixed = (float *)memory.get(), *const wide = mixed + N * WIDE;  // (N, WIDE) each
    float *const x = wide + N * WIDE, *const scores = x + N * WIDE;              // (N, C), (threads, GROUP, SCORES)
    const std::unique_ptr<Floats[]> prepared{new Floats[N * Kind::bytes(WIDE) / sizeof(Floats)]};
    const Inputs inputs{(uint8_t *)prepared.get(), Kind::bytes(WIDE)};
    const std::vector<std::pair<int, int>> grouped = groups();

    template <class Work> void each(int count, Work work) const {
        threads::share(threads, count, 1, [&](int, int begin, int end) {
            for (int i = begin; i < end; i++) work(i);
        });
    }
    void multiply(const Matrix &matrix, int rows, int width, int tokens, Output out) const {
        product<Kind>(threads, matrix, rows, width, inputs, tokens, out);
    }
    void prepare(int token, int width) const {  // the padding becomes 0: what lies there may be nan
        float *row = wide + token * WIDE;
        std::fill(row + width, row + round_up(width, PADDING), 0.0f);
        Kind::prepare(row, round_up(width, PADDING), inputs.data + token * inputs.stride);
    }
    void embed(int token) const {
        const auto *weight = (const typename Kind::Weight *)model.token.weight + batch.ids[token] * C;
        float scale = model.token.scale ? model.token.scale[batch.ids[token]] : 1.0f;
        for (int c = 0; c < C; c++) {
            float value;
            if constexpr (std::is_same_v<typename Kind::Weight, int8_t>) value = weight[c];
            else value = load(weight + c, 1)[0];
            x[token * C + c] = value * scale + model.position[batch.positions[token] * C + c];
        }
    }
    T *cached(void *layer, size_t row, size_t head, size_t position) const {  // layer: its keys or values
        return (T *)layer + ((row * H + head) * S + position) * D;
    }
    void append(int token, void *layer, const float *from) const {
        for (int head = 0; head < H; head++) {
            T *to = cached(layer, batch.rows[token], head, batch.positions[token]);
            for (int d = 0; d < D; d += LANES) store(to + d, load(from + head * D + d, D - d), D - d);
        }
    }
    bool follows(int token, int first) const {  // in the same row, as many positions further as tokens
        return token < N && batch.rows[token] == batch.rows[first] &&
               batch.positions[token] == batch.positions[first] + token - first;
    }
    std::vector<std::pair<int, int>> groups() const {  // (first token, number of tokens), GROUP or 1 each
        std::vector<std::pair<int, int>> result;
        for (int token = 0, size; token < N; token += size) {
            for (size = 1; size < GROUP && follows(token + size, token);) size++;
            result.emplace_back(token, size = size < GROUP ? 1 : size);
        }
        return result;
    }
    void attention(int layer) const {
        threads::share(threads, grouped.size() * H, 1, [&](int thread, int begin, int end) {
            for (int i = begin; i < end; i++) {
                auto [token, size] = grouped[i / H];
                attend_group(layer, thread, token, size, i % H);
            }
        });
    }
    void attend_group(int layer, int thread, int token, int size, int head) const {
        const T *keys = cached(cache.keys[layer], batch.rows[token], head, 0);
        const T *values = cached(cache.values[layer], batch.rows[token], head, 0);
        auto *function = size == 1 ? (D % (4 * LANES) ? attend<T, 1, 1> : attend<T, 1, 4>)
                                   : (D % (COLUMNS * LANES) ? attend<T, GROUP, 1> : attend<T, GROUP, COLUMNS>);
        size_t at = token * WIDE + head * D;
        float *own_scores = scores + thread * GROUP * SCORES;
        function(mixed + at, WIDE, keys, values, batch.positions[token], D, S, own_scores, SCORES, wide + at);
    }
    void normalised(const float *scale, const float *shift) const {
        each(N, [&](int token) {
            normalise(x + token * C, scale, shift, C, wide + token * WIDE);
            prepare(token, C);
        });
    }
    void block(int number) const {
        const Layer &layer = model.layer[number];
        normalised(layer.norm_1, layer.shift_1);
        multiply(layer.qkv, 3 * C, C, N, {mixed, WIDE, false});
        each(N, [&](int token) {
            append(token, cache.keys[number], mixed + token * WIDE + C);
            append(token, cache.values[number], mixed + token * WIDE + 2 * C);
        });
        attention(number);
        each(N, [&](int token) { prepare(token, C); });
        multiply(layer.proj, C, C, N, {x, size_t(C), true});
        normalised(layer.norm_2, layer.shift_2);
        multiply(layer.fc, F, C, N, {wide, WIDE, false});
        each(N, [&](int token) {
            float *row = wide + token * WIDE;
            for (int f = 0; f < F; f += LANES) store(row + f, gelu(load(row + f, F - f)), F - f);
            prepare(token, F);
        });
        multiply(layer.out, C, F, N, {x, size_t(C), true});
    }
    void run() const {
        each(N, [&](int token) { embed(token); });
        for (int layer = 0; layer < model.layers; layer++) block(layer);
        each(batch.outputs, [&](int output) {
            normalise(x + batch.wanted[output] * C, model.norm, model.shift, C, wide + output * WIDE);
            prepare(output, C);
        });
        multiply(model.token, model.vocabulary, C, batch.outputs, {batch.logits, size_t(model.vocabulary), false});
    }
};

template <class Kind, class T> void run(const Model &model, const Cache &cache, const Batch &batch) {
    Call<Kind, T>{model, cache, batch}.run();
}

}  // namespace

// Appends the tokens to the cache and computes the wanted logits. Returns 0; 1 + i if token i has an id, row or
// position that does not exist; -1 if memory runs out.
extern "C" int64_t gpt_forward(const Model *model, const Cache *cache, const Batch *batch) try {
    for (int64_t i = 0; i < batch->tokens; i++) {
        auto exists = [](int64_t value, int64_t end) { return value >= 0 && value < end; };
        if (!exists(batch->ids[i], model->vocabulary) || !exists(batch->rows[i], cache->rows) ||
            !exists(batch->positions[i], std::min(cache->capacity, model->positions)))
            return i + 1;
    }
    constexpr decltype(&run<Fp32, float>) kinds[] = {run<Fp32, float>, run<Bf16, uint16_t>, run<Int8, float>,
                                                     run<Int8, uint16_t>, run<Fp16, Half>, run<Int8, Half>};
    kinds[model->kind](*model, *cache, *batch);
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}
