// Logits -> next ids on a CPU: what `choose` of gpt/sampling.py does, its plain-torch twin, without sorting the
// vocabulary. Given equal weights the ids are equal; the weights may differ by the rounding of `exp`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t NOT_FINITE = -1, DRAW_BITS = 30, DRAWS = 1 << DRAW_BITS, BLOCK = 64;
constexpr double UNITS = 0x1p32;        // what probability 1 is in whole numbers
constexpr double NO_FRACTION = 0x1p52;  // a number to add: the sum is rounded to a whole one, its lowest bits
constexpr uint64_t NO_FRACTION_BITS = 0x433ull << 52;
constexpr uint32_t INFINITE = 0x7F800000, MAGNITUDE = 0x7FFFFFFF, WORD = 0xFFFFFFFF;
constexpr uint64_t LAST_PLACE = uint64_t(INFINITE) << 32 | WORD;
constexpr float NO_WEIGHT = -24;  // e^-24 UNITS is rounded to 0: tokens of lower values are never drawn
constexpr float FEW = 256;        // tokens that are quickly put in order
constexpr int TURNS = 12;         // to narrow a band down to FEW tokens; it may have more of one value

typedef float Eight __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint64_t Wholes __attribute__((vector_size(64)));

struct Choice {  // as gpt/kernels/native_sampler.py declares it; from `turns` on, null unless a step is to be ended
    int64_t rows, vocabulary, stride, banned_count, draws_ahead, eot, threads;  // stride: floats from row to row
    float *logits;
    const float *temperature, *min_p, *penalty;
    const int64_t *top_k, *top_p, *banned, *draws;  // draws: draws_ahead for each row, of which the turn's is used
    const uint8_t *seen;
    int64_t *ids, *turns, *next;
    const bool *ignores_eot;  // where `eot` is never chosen
};

inline uint32_t magnitude(float value) { return read<uint32_t>(&value) & MAGNITUDE; }

// A token's place, as the twin's `ranking`: the magnitude of its value (<= 0), then its id.
inline uint64_t place(float value, uint64_t id) { return uint64_t(magnitude(value)) << 32 | id; }

inline float maximum(const float *logits, int64_t count) {  // by whole numbers in their order, which are vectorised
    int32_t best = std::numeric_limits<int32_t>::min();
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = read<int32_t>(logits + i);
        best = std::max(best, bits ^ ((bits >> 31) & int32_t(MAGNITUDE)));
    }
    best ^= (best >> 31) & int32_t(MAGNITUDE);
    return read<float>(&best);
}

inline uint64_t bits_of(Ints mask) {  // one for each lane
#ifdef __AVX512DQ__
    return _mm512_movepi32_mask((__m512i)mask);
#else
    uint64_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}

// e^x of x <= 0, bit for bit that of `exp`, for several vectors step by step: their waits overlap.
template <int COUNT> inline void exponentials(Floats (&x)[COUNT]) {
    Floats power[COUNT], scale[COUNT], sum[COUNT];
    auto each = [](auto step) { for (int i = 0; i < COUNT; i++) step(i); };
    each([&](int i) { x[i] = x[i] < -87.0f ? Floats{} - 87.0f : x[i]; });
    each([&](int i) { power[i] = x[i] * 1.44269504f + 12582912.0f; });  // 1.5 * 2^23: its lowest bits are an integer
    each([&](int i) { scale[i] = (Floats)(((Ints)power[i] - (0x4B400000 - 127)) << 23); });
    each([&](int i) { power[i] -= 12582912.0f; });
    each([&](int i) { x[i] = multiply_add(power[i], Floats{} - 0.693359375f, x[i]); });
    each([&](int i) { x[i] = multiply_add(power[i], Floats{} + 2.12194440e-4f, x[i]); });
    each([&](int i) { sum[i] = Floats{} + 1.9875691500e-4f; });
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        each([&](int i) { sum[i] = multiply_add(sum[i], x[i], Floats{} + factor); });
    each([&](int i) { x[i] = (multiply_add(sum[i], x[i] * x[i], x[i]) + 1.0f) * scale[i]; });
}

struct Settings {
    float temperature;
    int64_t top_k, top_p;
    float min_p, penalty;
};

struct alignas(64) Block {
    float values[BLOCK];  // logits over the temperature, 0 for the likeliest; -inf after the last
    float powers[BLOCK];  // of e, to `values`

    // The sum of the weights, powers times `scale`, up to the place `last`; `start` is the first id.
    uint64_t mass_until(uint64_t last, uint64_t start, double scale) const {
        if (last == LAST_PLACE) return mass(powers, scale);
        alignas(64) float kept[BLOCK];
        uint32_t border = last >> 32, border_id = last;
        int ids = border_id < start ? 0 : std::min<uint64_t>(border_id - start + 1, BLOCK);  // up to the last's
        int32_t limit = border + (ids == BLOCK);
        for (int i = 0; i < BLOCK; i += LANES)
            store(kept + i, (read<Ints>(values + i) & int32_t(MAGNITUDE)) < limit ? load(powers + i) : 0.0f);
        for (int i = 0; i < ids && ids < BLOCK; i++)
            if (magnitude(values[i]) == border) kept[i] = powers[i];
        return mass(kept, scale);
    }

    static uint64_t mass(const float *powers, double scale) {
        Wholes sums = {};
        for (int i = 0; i < BLOCK; i += 8)
            sums += (Wholes)(__builtin_convertvector(read<Eight>(powers + i), Doubles) * scale + NO_FRACTION);
        uint64_t four[4];  // two steps: GCC 12 adds eight one by one
        for (int i = 0; i < 4; i++) four[i] = sums[i] + sums[i + 4];
        return (four[0] + four[1]) + (four[2] + four[3]) - BLOCK * NO_FRACTION_BITS;
    }
};

struct Sum {
    float count, mass;  // of tokens, exact below 2^24; of their powers, but for rounding
};

struct Row {
    std::vector<float> changed;    // logits with the penalty and without those banned, if there are any
    std::vector<float> maxima;     // of each block's logits, then of its values
    std::vector<Block> blocks;
    std::vector<uint64_t> masses;  // sums of the kept weights of each block
    std::vector<uint64_t> places;  // of the tokens in a band of values
    double scale;                  // from powers to weights: probabilities in units of 1 / UNITS

    // The maximum of each block; whether all logits are finite.
    bool scan(const float *logits, int64_t count) {
        maxima.clear();
        for (int64_t start = 0; start < count; start += BLOCK)
            maxima.push_back(maximum(logits + start, std::min(BLOCK, count - start)));
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; i++) largest = std::max(largest, magnitude(logits[i]));
        return largest < INFINITE;
    }

    void penalize(const uint8_t *seen, float penalty) {
        constexpr float huge = std::numeric_limits<float>::max();
        for (size_t i = 0; i < changed.size(); i++) {
            float other = changed[i] < 0 ? changed[i] * penalty : changed[i] / penalty;
            changed[i] = seen[i] ? std::min(std::max(other, -huge), huge) : changed[i];
        }
    }

    // Logits -> blocks.
    void weigh(const float *logits, int64_t count, float temperature) {
        float top = maximum(maxima.data(), maxima.size()), total = 0;
        for (float &maximum : maxima) maximum = (maximum - top) / temperature;
        blocks.resize(maxima.size());
        Floats sums = {};
        for (int64_t start = 0; start < count; start += BLOCK) {
            Block &block = blocks[start / BLOCK];
            Floats x[BLOCK / LANES];
            for (int i = 0; i < BLOCK / LANES; i++) {
                int64_t left = std::max<int64_t>(count - start - i * LANES, 0);
                x[i] = (load(logits + start + i * LANES, left) - top) / temperature;
                for (int64_t lane = left; lane < LANES; lane++) x[i][lane] = -INFINITY;
                store(block.values + i * LANES, x[i]);
            }
            exponentials(x);
            for (int i = 0; i < BLOCK / LANES; i++) {
                store(block.powers + i * LANES, x[i]);
                sums += x[i];
            }
        }
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
        scale = UNITS / total;
    }

    uint64_t place_of(uint64_t id) const { return place(blocks[id / BLOCK].values[id % BLOCK], id); }
    uint64_t weight(uint64_t id) const { return std::nearbyint(blocks[id / BLOCK].powers[id % BLOCK] * scale); }

    // The sum of the weights up to the place `last`; of each block in `masses`.
    uint64_t mass_until(uint64_t last) {
        uint64_t total = 0;
        masses.assign(maxima.size(), 0);
        for (size_t i = 0; i < maxima.size(); i++)
            if (magnitude(maxima[i]) <= last >> 32) total += masses[i] = blocks[i].mass_until(last, i * BLOCK, scale);
        return total;
    }

    // Of the tokens of values from `least` up.
    Sum sum_from(float least) const {
        Floats count = {}, mass = {};
        for (size_t block = 0; block < maxima.size(); block++)
            for (int i = 0; i < BLOCK && maxima[block] >= least; i += LANES) {
                Ints from = load(blocks[block].values + i) >= least;
                mass += from ? load(blocks[block].powers + i) : 0.0f;
                count += from ? Floats{} + 1.0f : 0.0f;
            }
        return {::total(count), ::total(mass)};
    }

    // Fills `places` with a narrow band of values: the tokens likelier than those in it are not `enough` yet, with them
    // they are, or all are that have a weight. Returns the value that the band is below.
    float find_band(float Sum::*measure, float enough) {
        float low = -1, high = 1;
        Sum from_low = sum_from(low), from_high = {};
        for (; from_low.*measure < enough && low > NO_WEIGHT; from_low = sum_from(low)) {
            high = low, from_high = from_low;
            low = std::max(2 * low, NO_WEIGHT);
        }
        for (int turn = 0; turn < TURNS && from_low.count - from_high.count > FEW; turn++) {
            float middle = (low + high) / 2;
            Sum sum = sum_from(middle);
            if (sum.*measure < enough)
                high = middle, from_high = sum;
            else
                low = middle, from_low = sum;
        }
        collect(low, high);
        return high;
    }

    // Fills `places` with the tokens of values from `low` up and below `high`, in the order of the ids.
    void collect(float low, float high) {
        places.clear();
        for (size_t block = 0; block < maxima.size(); block++) {
            uint64_t band = 0;
            for (int i = 0; i < BLOCK && maxima[block] >= low; i += LANES) {
                Floats values = load(blocks[block].values + i);
                band |= bits_of((values >= low) & (values < high)) << i;
            }
            for (; band; band &= band - 1) places.push_back(place_of(block * BLOCK + __builtin_ctzll(band)));
        }
    }

    // The place of the last token that top-k keeps: the k-th one's, or after it that of one as likely.
    uint64_t last_of(int64_t top_k) {
        float high = find_band(&Sum::count, top_k);
        int64_t index = top_k - 1 - int64_t(sum_from(high).count);
        if (index >= int64_t(places.size())) return LAST_PLACE;  // fewer have a weight
        std::nth_element(places.begin(), places.begin() + index, places.end());
        return places[index] | WORD;
    }

    // The place of the last token before which there is less than `enough`, in units of 1 / (UNITS * DRAWS).
    uint64_t nucleus(uint64_t enough) {
        float high = find_band(&Sum::mass, enough / (scale * DRAWS));
        uint64_t mass = high > 0 ? 0 : mass_until(place(high, WORD)), inside = 0;
        for (uint64_t place : places) inside += weight(place & WORD);
        if (mass << DRAW_BITS >= enough || (mass + inside) << DRAW_BITS < enough) {  // rounding misled the search
            collect(NO_WEIGHT, 1);
            mass = 0;
        }
        auto first = places.begin(), end = places.end();
        while (end - first > 1) {
            auto middle = first + (end - first) / 2;
            std::nth_element(first, middle, end);
            uint64_t more = mass;
            for (auto place = first; place < middle; place++) more += weight(*place & WORD);
            if (more << DRAW_BITS >= enough)
                end = middle;
            else
                first = middle, mass = more;
        }
        return *first;
    }

    // The place of the last token that top-k, top-p and min-p keep.
    uint64_t last_kept(const Settings &settings, int64_t count) {
        bool limited = settings.top_k > 0 && settings.top_k < count;
        uint64_t last = limited ? last_of(settings.top_k) : LAST_PLACE;
        if (settings.top_p < DRAWS)
            last = std::min(last, nucleus(std::max<uint64_t>(mass_until(last) * settings.top_p, 1)));
        return std::min(last, place(settings.min_p, WORD));
    }

    // The id at the share `number` / DRAWS of the weights up to the place `last`, in the order of the ids.
    int64_t draw(uint64_t last, uint64_t number) {
        uint64_t left = mass_until(last) * number >> DRAW_BITS, block = 0;
        for (; left >= masses[block]; block++) left -= masses[block];
        for (uint64_t id = block * BLOCK;; id++) {
            uint64_t own = place_of(id) <= last ? weight(id) : 0;
            if (left < own) return id;
            left -= own;
        }
    }

    int64_t choose(const float *logits, int64_t count, const Settings &settings, const uint8_t *seen,
                   const int64_t *banned, int64_t banned_count, int64_t number) {
        if (!scan(logits, count)) return NOT_FINITE;
        bool penalized = seen && settings.penalty != 1;
        if (penalized || banned_count) {
            changed.assign(logits, logits + count);
            if (penalized) penalize(seen, settings.penalty);
            for (int64_t i = 0; i < banned_count; i++) changed[banned[i]] = -INFINITY;
            scan(logits = changed.data(), count);
        }
        if (settings.temperature == 0) {
            auto best = std::find(maxima.begin(), maxima.end(), maximum(maxima.data(), maxima.size()));
            return std::find(logits + (best - maxima.begin()) * BLOCK, logits + count, *best) - logits;
        }
        weigh(logits, count, settings.temperature);
        return draw(last_kept(settings, count), number);
    }
};

}  // namespace

// Logits of `rows` rows -> ids, which it writes. The settings are those of Filters, one per row; `seen` is null or one
// byte per row and token; `banned` are ids below `vocabulary`, not all of them; draws are at least 0 and below DRAWS.
extern "C" void gpt_choose(const Choice *all) {
    const Choice &choice = *all;
#pragma omp parallel for schedule(dynamic, 1) num_threads(choice.threads) if (choice.rows > 1 && choice.threads > 1)
    for (int64_t row = 0; row < choice.rows; row++) {
        static thread_local Row scratch;
        Settings settings{choice.temperature[row], choice.top_k[row], choice.top_p[row], choice.min_p[row],
                          choice.penalty[row]};
        const uint8_t *seen = choice.seen ? choice.seen + row * choice.vocabulary : nullptr;
        float *logits = choice.logits + row * choice.stride;
        int64_t turn = choice.turns ? choice.turns[row]++ % choice.draws_ahead : 0;
        if (choice.ignores_eot && choice.ignores_eot[row]) logits[choice.eot] = -std::numeric_limits<float>::max();
        int64_t id = scratch.choose(logits, choice.vocabulary, settings, seen, choice.banned, choice.banned_count,
                                    choice.draws[row * choice.draws_ahead + turn]);
        choice.ids[row] = id;
        if (choice.next) choice.next[row] = std::max<int64_t>(id, 0);
    }
}
