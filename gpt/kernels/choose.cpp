// Logits -> next ids on a CPU: what `choose` of gpt/sampling.py does, its plain-torch twin, without sorting the
// vocabulary. Given equal weights the ids are equal; the weights may differ by the rounding of `exponential`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t NOT_FINITE = -1, DRAW_BITS = 30, DRAWS = 1 << DRAW_BITS, BLOCK = 64;
constexpr double UNITS = 0x1p32;                                // what probability 1 is in whole numbers
constexpr double NO_FRACTION = 0x1p52;                          // a number to add: the sum is rounded to a whole one
constexpr float NO_FRACTION32 = 0x1.8p23f;
constexpr uint32_t INFINITE = 0x7F800000, MAGNITUDE = 0x7FFFFFFF, WORD = 0xFFFFFFFF;

// A token's place, as the twin's `ranking`: the magnitude of its value (<= 0), then its id. Buckets are runs of places,
// 256 to a power of two, from values of -2^-12 (closer to 0: the first) to -2^7 (whose weight is 0: the last).
constexpr int BUCKET_SHIFT = 15, FIRST_BUCKET = (127 - 12) << 8, BUCKETS = 19 << 8;
constexpr int COUNT_SHIFT = 40;  // a bucket's number: the count of its tokens above the sum of their weights
constexpr uint64_t MASS = (1ull << COUNT_SHIFT) - 1;

template <class To, class From> inline To bits(From value) {
    To result;
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&result, &value, sizeof result);
    return result;
}

inline uint32_t magnitude(float value) { return bits<uint32_t>(value) & MAGNITUDE; }

// e^x of x <= 0, never below e^-87.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + NO_FRACTION32, power = shifted - NO_FRACTION32;
    float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // less ln 2 * power, in two parts
    float sum = 1.9875691500e-4f;  // the polynomial of Cephes' expf
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        sum = sum * rest + factor;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * bits<float>((bits<int32_t>(shifted) - bits<int32_t>(NO_FRACTION32) + 127) << 23);
}

struct Settings {
    float temperature;
    int64_t top_k, top_p;
    float min_p, penalty;
};

struct Row {
    std::vector<float> values;      // logits, then those over the temperature, 0 for the likeliest
    std::vector<int64_t> weights;   // probabilities in units of 1 / UNITS
    std::vector<float> powers;      // of e, to `values`
    std::vector<uint16_t> bucket_of;
    std::vector<uint64_t> buckets;
    std::vector<uint64_t> places;   // of one bucket, sorted
    std::vector<int64_t> masses;    // sums of the kept weights of BLOCK ids each

    // Takes a row's logits; whether all are finite.
    bool load(const float *logits, int64_t count) {
        values.resize(count);
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; i++) {
            largest = std::max(largest, magnitude(logits[i]));
            values[i] = logits[i];
        }
        return largest < INFINITE;
    }

    void penalize(const uint8_t *seen, float penalty) {
        constexpr float huge = std::numeric_limits<float>::max();
        for (size_t i = 0; i < values.size(); i++) {
            float changed = values[i] < 0 ? values[i] * penalty : values[i] / penalty;
            values[i] = seen[i] ? std::min(std::max(changed, -huge), huge) : values[i];
        }
    }

    float maximum() const {  // by whole numbers in the floats' order, whose maximum compilers vectorise
        int32_t best = std::numeric_limits<int32_t>::min();
        for (float value : values) {
            int32_t whole = bits<int32_t>(value);
            best = std::max(best, whole ^ ((whole >> 31) & int32_t(MAGNITUDE)));
        }
        return bits<float>(best ^ ((best >> 31) & int32_t(MAGNITUDE)));
    }

    // Logits -> values and weights.
    void weigh(float temperature) {
        float top = maximum(), total = 0;
        int64_t count = values.size();
        powers.resize(count);
        weights.resize(count);
        float *value = values.data(), *power = powers.data();
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; i++) {
            value[i] = (value[i] - top) / temperature;
            power[i] = exponential(value[i]);
            total += power[i];
        }
        double scale = UNITS / total;
        for (int64_t i = 0; i < count; i++)
            weights[i] = bits<int64_t>(power[i] * scale + NO_FRACTION) - bits<int64_t>(NO_FRACTION);
    }

    void fill_buckets() {
        size_t count = values.size();
        bucket_of.resize(count);
        for (size_t i = 0; i < count; i++) {
            int bucket = int(magnitude(values[i]) >> BUCKET_SHIFT) - FIRST_BUCKET;
            bucket_of[i] = std::min(std::max(bucket, 0), BUCKETS - 1);
        }
        buckets.assign(BUCKETS, 0);
        for (size_t i = 0; i < count; i++) buckets[bucket_of[i]] += weights[i] | 1ull << COUNT_SHIFT;
    }

    void sort_bucket(int bucket) {
        places.clear();
        for (size_t start = 0; start < values.size(); start += BLOCK) {
            size_t end = std::min<size_t>(start + BLOCK, values.size());
            uint16_t any = 0;
            for (size_t i = start; i < end; i++) any |= bucket_of[i] == bucket;
            for (size_t i = start; any && i < end; i++)
                if (bucket_of[i] == bucket) places.push_back(uint64_t(magnitude(values[i])) << 32 | i);
        }
        std::sort(places.begin(), places.end());
    }

    // The place of the last token that top-k, top-p and min-p keep.
    uint64_t last_kept(const Settings &settings) {
        uint64_t last = uint64_t(magnitude(settings.min_p)) << 32 | WORD, total = 0;
        bool limited = settings.top_k > 0 && settings.top_k < int64_t(values.size());
        if (!limited && settings.top_p == DRAWS) return last;
        fill_buckets();
        if (limited) {
            int64_t count = 0;
            int bucket = 0;
            for (; count + int64_t(buckets[bucket] >> COUNT_SHIFT) < settings.top_k; bucket++) {
                count += buckets[bucket] >> COUNT_SHIFT;
                total += buckets[bucket] & MASS;
            }
            if (buckets[bucket] & MASS) {  // else it does not matter where the border is
                sort_bucket(bucket);
                uint64_t border = places[settings.top_k - count - 1] | WORD;  // with ties
                for (uint64_t place : places)
                    if (place <= border) total += weights[place & WORD];
                last = std::min(last, border);
            }
        } else {
            for (uint64_t packed : buckets) total += packed & MASS;
        }
        if (settings.top_p == DRAWS) return last;
        return std::min(last, nucleus(total * settings.top_p));
    }

    // The place of the last token before which there is less than `enough`, in units of 1 / (UNITS * DRAWS).
    uint64_t nucleus(uint64_t enough) {
        uint64_t mass = 0;
        int bucket = 0;
        for (; bucket < BUCKETS - 1 && (mass + (buckets[bucket] & MASS)) << DRAW_BITS < enough; bucket++)
            mass += buckets[bucket] & MASS;
        sort_bucket(bucket);
        uint64_t last = places[0];
        for (uint64_t place : places) {
            if (mass << DRAW_BITS >= enough) break;
            last = place;
            mass += weights[place & WORD];
        }
        return last;
    }

    // The id at the share `number` / DRAWS of the weights up to the place `last`, in the order of the ids.
    int64_t draw(uint64_t last, int64_t number) {
        uint32_t border = last >> 32, border_id = last;
        int64_t count = values.size(), total = 0;
        masses.clear();
        for (int64_t start = 0; start < count; start += BLOCK) {
            int64_t mass = 0, end = std::min(start + BLOCK, count);
            for (int64_t i = start; i < end; i++) {
                uint32_t own = magnitude(values[i]);
                bool keep = own < border || (own == border && uint32_t(i) <= border_id);
                weights[i] = keep ? weights[i] : 0;
                mass += weights[i];
            }
            masses.push_back(mass);
            total += mass;
        }
        int64_t left = int64_t(uint64_t(total) * number >> DRAW_BITS), id = 0;
        for (int64_t mass : masses) {
            if (left < mass) break;
            left -= mass;
            id += BLOCK;
        }
        while (left >= weights[id]) left -= weights[id++];
        return id;
    }

    int64_t choose(const float *logits, int64_t count, const Settings &settings, const uint8_t *seen,
                   const int64_t *banned, int64_t banned_count, int64_t number) {
        if (!load(logits, count)) return NOT_FINITE;
        if (seen && settings.penalty != 1) penalize(seen, settings.penalty);
        for (int64_t i = 0; i < banned_count; i++) values[banned[i]] = -INFINITY;
        if (settings.temperature == 0) return std::find(values.begin(), values.end(), maximum()) - values.begin();
        weigh(settings.temperature);
        return draw(last_kept(settings), number);
    }
};

}  // namespace

// Logits of `rows` rows of `vocabulary`, each `stride` floats after the last -> ids. The settings are those of Filters,
// one per row; `seen` is null or one byte per row and token, `seen_stride` bytes from row to row; `banned` are N ids
// below `vocabulary`; `draws` are at least 0 and below DRAWS.
extern "C" void gpt_choose(const float *logits, int64_t rows, int64_t vocabulary, int64_t stride,
                           const float *temperature, const int64_t *top_k, const int64_t *top_p, const float *min_p,
                           const float *penalty, const uint8_t *seen, int64_t seen_stride, const int64_t *banned,
                           int64_t banned_count, const int64_t *draws, int64_t *ids, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows > 1 && threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        static thread_local Row scratch;
        Settings settings{temperature[row], top_k[row], top_p[row], min_p[row], penalty[row]};
        const uint8_t *row_seen = seen ? seen + row * seen_stride : nullptr;
        const float *own = logits + row * stride;
        ids[row] = scratch.choose(own, vocabulary, settings, row_seen, banned, banned_count, draws[row]);
    }
}
