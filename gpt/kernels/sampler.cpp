// Logits -> next ids on a CPU, without sorting the vocabulary: what `choose` of gpt/generate/sampling.py computes in
// plain torch. From equal weights both choose equal ids; the weights may differ by the rounding of e^x.
//
// For each row:
//     value  = (logit - greatest logit) / temperature            0 for the likeliest token, negative for the others
//     power  = e^value
//     weight = round(power / sum of powers * 2^32)               a whole number: its sums are exact in any order
//     place  = (bits of -value, id), as one 64-bit number        rises from the likeliest token to the least likely
//     last   = the last place that top-k, top-p and min-p keep   each of them keeps the tokens up to some place
//     target = sum of the weights up to `last` * draw / 2^30
//     the chosen id is the first at which the sum of the weights up to `last`, in the order of the ids, passes `target`
//
// The k-th likeliest token is searched in bands of values. An example with top_k = 50:
//     values >= -1:  12 tokens         too few: twice as far down
//     values >= -2:  40 tokens         too few
//     values >= -4: 700 tokens         enough: the 50th lies in [-4, -2), a band of 660 tokens
//     values >= -3: 130 tokens         halves the band until it holds at most FEW = 256 tokens: [-3, -2) has 90
// The 10th of these 90 is the 50th of all. Top-p is the same search with sums of powers in place of numbers of tokens.
// Blocks of 64 tokens whose greatest value lies below a band are skipped.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t NOT_FINITE = -1, DRAW_BITS = 30, DRAWS = 1 << DRAW_BITS, BLOCK = 64;
constexpr double UNITS = 0x1p32;        // the weight of probability 1
constexpr double NO_FRACTION = 0x1p52;  // added to a double, leaves the nearest whole number in its lowest bits
constexpr uint64_t NO_FRACTION_BITS = 0x433ull << 52;
constexpr uint32_t INFINITE = 0x7F800000, MAGNITUDE = 0x7FFFFFFF, WORD = 0xFFFFFFFF;
constexpr uint64_t LAST_PLACE = uint64_t(INFINITE) << 32 | WORD;
constexpr float NO_WEIGHT = -24;  // tokens of lower values have the weight 0, as e^-24 2^32 < 0.5
constexpr float LARGEST = std::numeric_limits<float>::max();
constexpr float FEW = 256;  // tokens that are quickly sorted
constexpr int HALVINGS = 12;  // of a band, at most: it may hold more than FEW tokens of one value

typedef float HalfFloats __attribute__((vector_size(2 * LANES)));  // as many as Doubles has lanes
typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef uint64_t Wholes __attribute__((vector_size(4 * LANES)));

struct Choice {  // as native_sampler.py declares it. R rows, V vocabulary
    int64_t rows, vocabulary, stride, banned_count, draws_ahead, eot, threads;  // stride: floats from row to row
    float *logits;                               // (R, V)
    const float *temperature, *min_p, *penalty;  // (R,), as in Filters of sampling.py
    const int64_t *top_k, *top_p;                // (R,)
    const int64_t *banned;                       // (banned_count,) ids that are never chosen, fewer than V; or null
    const int64_t *draws;                        // (R, draws_ahead) below DRAWS, one for each turn
    const uint8_t *seen;                         // (R, V) tokens that the penalty is for, or null
    int64_t *ids;                                // (R,) result: the id, or NOT_FINITE
    int64_t *turns, *next;                       // (R,) counted up, and set to the id, unless null
    const bool *ignores_eot;                     // (R,) rows that never choose `eot`, or null
};

inline uint32_t magnitude(float value) { return read<uint32_t>(&value) & MAGNITUDE; }
inline uint64_t place(float value, uint64_t id) { return uint64_t(magnitude(value)) << 32 | id; }

struct Sum {
    float count, mass;  // of tokens, exact below 2^24; of their powers
};

struct Row {  // one row's tokens, in blocks of BLOCK; those after the last have the value -inf
    std::vector<float> values;     // first the logits, then as above
    std::vector<float> powers;
    std::vector<float> maxima;     // the greatest value of each block
    std::vector<uint64_t> masses;  // the sum of the kept weights of each block
    std::vector<uint64_t> places;  // of the tokens in a band
    double scale;                  // weight = round(power * scale)

    // Reads the logits of a row, with the penalty and without the banned ids. Returns whether all are finite.
    bool read_logits(const float *logits, const Choice &choice, int64_t row) {
        size_t count = choice.vocabulary;
        uint32_t largest = 0;
        for (size_t i = 0; i < count; i++) largest = std::max(largest, magnitude(logits[i]));
        values.assign(logits, logits + count);
        if (choice.seen && choice.penalty[row] != 1) penalize(choice.seen + row * count, choice.penalty[row]);
        for (int64_t i = 0; i < choice.banned_count; i++) values[choice.banned[i]] = -INFINITY;
        values.resize(round_up(count, BLOCK), -INFINITY);
        maxima.clear();
        for (auto value = values.begin(); value < values.end(); value += BLOCK) {
            Floats most = load(&*value);
            for (int i = LANES; i < BLOCK; i += LANES) most = greater(most, load(&value[i]));
            maxima.push_back(greatest(most));
        }
        return largest < INFINITE;
    }

    void penalize(const uint8_t *seen, float penalty) {
        for (size_t i = 0; i < values.size(); i++) {
            float penalized = values[i] < 0 ? values[i] * penalty : values[i] / penalty;
            values[i] = seen[i] ? std::min(std::max(penalized, -LARGEST), LARGEST) : values[i];
        }
    }

    int64_t likeliest() const {
        auto block = std::max_element(maxima.begin(), maxima.end());
        auto first = values.begin() + (block - maxima.begin()) * BLOCK;
        return std::find(first, values.end(), *block) - values.begin();
    }

    // Turns logits into values and powers.
    void weigh(float temperature) {
        float top = *std::max_element(maxima.begin(), maxima.end()), total = 0;
        for (float &maximum : maxima) maximum = (maximum - top) / temperature;
        powers.resize(values.size());
        Floats sums = {};
        for (size_t start = 0; start < values.size(); start += BLOCK) {
            Floats x[BLOCK / LANES];
            for (int i = 0; i < BLOCK / LANES; i++) {
                x[i] = (load(&values[start + i * LANES]) - top) / temperature;
                store(&values[start + i * LANES], x[i]);
            }
            exponentials(x);
            for (int i = 0; i < BLOCK / LANES; i++) {
                store(&powers[start + i * LANES], x[i]);
                sums += x[i];
            }
        }
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
        scale = UNITS / total;
    }

    uint64_t place_of(uint64_t id) const { return place(values[id], id); }
    uint64_t weight(uint64_t id) const { return std::nearbyint(powers[id] * scale); }

    // Returns the sum of the weights up to the place `last`; fills `masses`.
    uint64_t mass_until(uint64_t last) {
        uint64_t total = 0;
        masses.assign(maxima.size(), 0);
        for (size_t block = 0; block < maxima.size(); block++)
            if (magnitude(maxima[block]) <= last >> 32) total += masses[block] = mass_until(last, block * BLOCK);
        return total;
    }

    // The same for the block that begins at the id `start`.
    uint64_t mass_until(uint64_t last, uint64_t start) const {
        float kept[BLOCK];
        for (int i = 0; i < BLOCK; i++) kept[i] = place_of(start + i) <= last ? powers[start + i] : 0;
        Wholes sums = {};
        for (int i = 0; i < BLOCK; i += LANES / 2)
            sums += (Wholes)(__builtin_convertvector(read<HalfFloats>(kept + i), Doubles) * scale + NO_FRACTION);
        uint64_t total = -BLOCK * NO_FRACTION_BITS;
        for (int i = 0; i < LANES / 2; i++) total += sums[i];
        return total;
    }

    // Returns number and powers of the tokens of values >= `least`.
    Sum sum_from(float least) const {
        Floats count = {}, mass = {};
        for (size_t block = 0; block < maxima.size(); block++)
            for (size_t i = block * BLOCK; i < (block + 1) * BLOCK && maxima[block] >= least; i += LANES) {
                Ints inside = load(&values[i]) >= least;
                mass += inside ? load(&powers[i]) : 0.0f;
                count += inside ? Floats{} + 1.0f : 0.0f;
            }
        return {::total(count), ::total(mass)};
    }

    // Searches the band [low, high) in which the measure, `count` or `mass`, comes to `enough`; with less than that in
    // all, the band ends at the last token that has a weight. Fills `places` with the band's tokens; returns `high`.
    float find_band(float Sum::*measure, float enough) {
        float low = -1, high = 1;
        Sum from_low = sum_from(low), from_high = {};
        for (; from_low.*measure < enough && low > NO_WEIGHT; from_low = sum_from(low)) {
            high = low, from_high = from_low;
            low = std::max(2 * low, NO_WEIGHT);
        }
        for (int turn = 0; turn < HALVINGS && from_low.count - from_high.count > FEW; turn++) {
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

    // Fills `places` with the tokens of values in [low, high).
    void collect(float low, float high) {
        places.clear();
        for (size_t block = 0; block < maxima.size(); block++) {
            if (maxima[block] < low) continue;
            const float *value = &values[block * BLOCK];
            bool inside[BLOCK];  // a loop of its own, which is vectorised
            for (int i = 0; i < BLOCK; i++) inside[i] = (value[i] >= low) & (value[i] < high);
            for (int i = 0; i < BLOCK; i++)
                if (inside[i]) places.push_back(place_of(block * BLOCK + i));
        }
    }

    // Returns the last place that top-k keeps: that of the k-th token, or of the last one with the same value.
    uint64_t last_of_top_k(int64_t top_k) {
        float high = find_band(&Sum::count, top_k);
        int64_t index = top_k - 1 - int64_t(sum_from(high).count);
        if (index >= int64_t(places.size())) return LAST_PLACE;  // fewer tokens have a weight
        std::nth_element(places.begin(), places.begin() + index, places.end());
        return places[index] | WORD;
    }

    // Returns the last place that top-p keeps: where the sum of the weights comes to `enough` / DRAWS.
    uint64_t last_of_top_p(uint64_t enough) {
        float high = find_band(&Sum::mass, enough / (scale * DRAWS));
        uint64_t mass = high > 0 ? 0 : mass_until(place(high, WORD)), inside = 0;
        for (uint64_t place : places) inside += weight(place & WORD);
        if (mass << DRAW_BITS >= enough || (mass + inside) << DRAW_BITS < enough) {  // rounding misled the search
            collect(NO_WEIGHT, 1);
            mass = 0;
        }
        std::sort(places.begin(), places.end());
        size_t i = 0;
        while (i + 1 < places.size() && (mass += weight(places[i] & WORD)) << DRAW_BITS < enough) i++;
        return places[i];
    }

    uint64_t last_kept(const Choice &choice, int64_t row) {
        int64_t top_k = choice.top_k[row], top_p = choice.top_p[row];
        uint64_t last = top_k > 0 && top_k < choice.vocabulary ? last_of_top_k(top_k) : LAST_PLACE;
        if (top_p < DRAWS) last = std::min(last, last_of_top_p(std::max<uint64_t>(mass_until(last) * top_p, 1)));
        return std::min(last, place(choice.min_p[row], WORD));
    }

    // Returns the id at draw / DRAWS of the weights up to the place `last`, in the order of the ids.
    int64_t id_at(uint64_t last, uint64_t draw) {
        uint64_t left = mass_until(last) * draw >> DRAW_BITS, block = 0;
        for (; left >= masses[block]; block++) left -= masses[block];
        for (uint64_t id = block * BLOCK;; id++) {
            uint64_t kept = place_of(id) <= last ? weight(id) : 0;
            if (left < kept) return id;
            left -= kept;
        }
    }

    int64_t choose(const float *logits, const Choice &choice, int64_t row, int64_t draw) {
        if (!read_logits(logits, choice, row)) return NOT_FINITE;
        if (choice.temperature[row] == 0) return likeliest();
        weigh(choice.temperature[row]);
        return id_at(last_kept(choice, row), draw);
    }
};

void choose(const Choice &choice, int64_t row) {
    static thread_local Row tokens;
    float *logits = choice.logits + row * choice.stride;
    if (choice.ignores_eot && choice.ignores_eot[row]) logits[choice.eot] = -LARGEST;
    int64_t turn = choice.turns ? choice.turns[row]++ % choice.draws_ahead : 0;
    choice.ids[row] = tokens.choose(logits, choice, row, choice.draws[row * choice.draws_ahead + turn]);
    if (choice.next) choice.next[row] = std::max<int64_t>(choice.ids[row], 0);
}

}  // namespace

// Chooses an id for each row.
extern "C" void gpt_choose(const Choice *call) {
    const Choice &choice = *call;
    threads::share(choice.threads, choice.rows, 1, [&](int, int begin, int end) {
        for (int row = begin; row < end; row++) choose(choice, row);
    });
}
