// Attention of few queries to tokens as they are stored: read once, in their own bytes, for all queries of a kv head.
// A task is a stretch of tokens of one row and kv head, of a length that does not depend on the threads: so the sums,
// which are taken in a fixed order, are the same bits however many there are.

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common.h"
#include "pool.h"

namespace hfkv {
namespace {

// By which the exponent of an fp8 number is too low where its bits stand in a float32's.
constexpr float FP8_SCALE = 0x1p120f;
constexpr int64_t LANES = 16, TILE = 16, STRETCH = 4096, MOST_ROWS = 4;

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Naturals __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Codes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <typename T> inline T load(const void *at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
}

inline void store(float *at, Vector x) { std::memcpy(at, &x, sizeof(x)); }

// 16 stored numbers, each in 32 bits. Compilers take several steps where processors have one.
inline Integers widen_bytes(const void *at) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtepi8_epi32(load<__m128i>(at));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(at), Shorts), Integers);
#endif
}

inline Naturals widen_codes(const void *at) {
#if defined(__AVX512F__)
    return (Naturals)_mm512_cvtepu8_epi32(load<__m128i>(at));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Codes>(at), Halves), Naturals);
#endif
}

inline Naturals widen_halves(const void *at) {
#if defined(__AVX512F__)
    return (Naturals)_mm512_cvtepu16_epi32(load<__m256i>(at));
#else
    return __builtin_convertvector(load<Halves>(at), Naturals);
#endif
}

inline Vector all(float x) { return Vector{} + x; }

inline Vector select(Integers where, Vector yes, Vector no) {
    return (Vector)((where & (Integers)yes) | (~where & (Integers)no));
}

// exp(x) to 2 units in the last place; 0 below -87, NaN stays NaN. After Cephes' expf.
inline Vector exp(Vector x) {
    Vector clamped = select(x > -87.0f, x, all(-87.0f));
    Vector shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2 ** 23: rounds to a whole number
    Vector n = shifted - 12582912.0f;
    Vector r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector found = p * (Vector)power;
    found = select(x < -87.0f, all(0.0f), found);
    return select(x == x, found, x);
}

inline Vector from_fp8(Naturals bits) {
    return (Vector)(((bits & 0x80) << 24) | ((bits & 0x7F) << 20)) * FP8_SCALE;
}

// The numbers of one stored row as float32 `[width]`, without its scale.
template <int64_t CODEC> inline void read_row(const char *row, int64_t width, float *out) {
    if (CODEC == NONE_F32) {
        std::memcpy(out, row, 4 * width);
        return;
    }
    if (CODEC == INT4) {
        int64_t half = (width + 1) / 2, i = 0;
        const uint8_t *codes = reinterpret_cast<const uint8_t *>(row);
        for (; i + LANES <= half; i += LANES) {
            Naturals both = widen_codes(codes + i);
            store(out + i, __builtin_convertvector((Integers)(both & 15) - 8, Vector));
            Vector upper = __builtin_convertvector((Integers)(both >> 4) - 8, Vector);
            if (half + i + LANES <= width) {
                store(out + half + i, upper);
            } else {
                for (int64_t j = 0; half + i + j < width; j++) out[half + i + j] = upper[j];
            }
        }
        for (; i < half; i++) {
            out[i] = float(int(codes[i] & 15) - 8);
            if (half + i < width) out[half + i] = float(int(codes[i] >> 4) - 8);
        }
        return;
    }
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        if (CODEC == INT8) store(out + i, __builtin_convertvector(widen_bytes(row + i), Vector));
        if (CODEC == FP8) store(out + i, from_fp8(widen_codes(row + i)));
        if (CODEC == NONE_BF16) store(out + i, (Vector)(widen_halves(row + 2 * i) << 16));
    }
    for (; i < width; i++) {
        uint8_t byte = uint8_t(row[i * (CODEC == NONE_BF16 ? 2 : 1)]);
        if (CODEC == INT8) out[i] = float(int8_t(byte));
        if (CODEC == FP8) out[i] = from_bits((uint32_t(byte & 0x80) << 24) | (uint32_t(byte & 0x7F) << 20)) * FP8_SCALE;
        if (CODEC == NONE_BF16) out[i] = from_bf16(load<uint16_t>(row + 2 * i));
    }
}

inline int64_t row_bytes(int64_t codec, int64_t width) {
    if (codec == NONE_F32) return 4 * width;
    if (codec == NONE_BF16) return 2 * width;
    return codec == INT4 ? (width + 1) / 2 : width;
}

// One vector of lanes of two others: 0 .. 15 are those of `a`, 16 .. 31 those of `b`.
template <int... LANE> inline Vector pick(Vector a, Vector b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, LANE...);
#else
    return __builtin_shuffle(a, b, Integers{LANE...});
#endif
}

inline Vector fold_singles(Vector a, Vector b) {
    return pick<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b) +
           pick<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
}

inline Vector fold_pairs(Vector a, Vector b) {
    return pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b) +
           pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
}

inline Vector fold_halves(Vector a, Vector b) {
    return pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b) +
           pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
}

inline Vector fold_fours(Vector a, Vector b) {
    return pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a, b) +
           pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a, b);
}

// The sums of the lanes of 16 vectors, as one vector.
inline Vector sums_of(const Vector *x) {
    Vector fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Vector *of = x + 4 * i;
        fours[i] = fold_pairs(fold_singles(of[0], of[1]), fold_singles(of[2], of[3]));
    }
    return fold_fours(fold_halves(fours[0], fours[1]), fold_halves(fours[2], fours[3]));
}

inline float sum_of(Vector x) {
    float lanes[LANES];
    store(lanes, x);
    for (int count = 8; count; count /= 2) {
        for (int i = 0; i < count; i++) lanes[i] += lanes[i + count];
    }
    return lanes[0];
}

// There are no NaNs.
inline float largest_of(Vector x, float largest) {
    float lanes[LANES];
    store(lanes, x);
    for (int count = 8; count; count /= 2) {
        for (int i = 0; i < count; i++) lanes[i] = lanes[i + count] > lanes[i] ? lanes[i + count] : lanes[i];
    }
    return lanes[0] > largest ? lanes[0] : largest;
}

struct Call {
    int64_t batch, columns, heads, groups, queries, key_width, value_width, codec, dtype, capacity, threads;
    int64_t query_strides[3], mask_strides[3], bounds_stride, pages;
    float scale, softcap;
    Meta layout;
    const char *query;
    const char *planes[4];
    const int64_t *bounds;
    const uint8_t *mask;
    const float *sink_logits;
    char *out;
    float *lse;

    int64_t rows() const { return groups * queries; }
    int64_t padded(int64_t width) const { return (width + LANES - 1) / LANES * LANES; }
};

// What a stretch of tokens comes to, for all queries of a kv head.
struct Part {
    std::vector<float> out, largest, sum;
};

class Task {
  public:
    Task(const Call &call, int64_t row, int64_t head) : call(call), b(row), h(head) {
        kd = call.padded(call.key_width), vd = call.padded(call.value_width);
        query.assign(call.rows() * kd, 0.0f), sums.assign(call.rows(), 0.0f);
        keys.assign(TILE * kd, 0.0f), values.assign(TILE * vd, 0.0f);
        weights.assign(call.rows() * TILE, 0.0f);
        const char *from = call.query;
        for (int64_t g = 0; g < call.groups; g++) {
            for (int64_t n = 0; n < call.queries; n++) {
                float *q = &query[(g * call.queries + n) * kd];
                int64_t at = b * call.query_strides[0] + (h * call.groups + g) * call.query_strides[1];
                at += n * call.query_strides[2];
                for (int64_t i = 0; i < call.key_width; i++) q[i] = load_number(from, call.dtype, at + i) * call.scale;
                if (call.codec == INT4) rotate(q, call.key_width);
                float sum = 0;
                for (int64_t i = 0; i < call.key_width; i++) sum += q[i];
                sums[g * call.queries + n] = sum;
            }
        }
    }

    template <int64_t CODEC> void attend(int64_t begin, int64_t end, Part &part) {
        part.out.assign(call.rows() * vd, 0.0f);
        part.largest.assign(call.rows(), -INFINITY), part.sum.assign(call.rows(), 0.0f);
        const Meta &layout = call.layout;
        if (!call.columns) {
            return attend_run<CODEC>(begin, end, (b * call.heads + h) * call.capacity + layout.start() + begin, part);
        }
        int64_t column = 0;
        // There may be room for more columns than hold anything: they begin nowhere.
        while (column + 1 < call.columns && layout.begins(column + 1) <= begin &&
               layout.high(column + 1) > layout.low(column + 1)) {
            column++;
        }
        for (; column < call.columns && layout.begins(column) < end; column++) {
            int64_t first = layout.begins(column), last = first + layout.high(column) - layout.low(column);
            int64_t from = std::max(first, begin), to = std::min(last, end);
            if (from >= to) continue;
            int64_t slot = (layout.page(b, column) * call.heads + h) * call.capacity + layout.low(column);
            attend_run<CODEC>(from, to, slot + from - first, part);
        }
    }

  private:
    // Tokens `begin .. end - 1`, which lie one after the other from `slot` on.
    template <int64_t CODEC> void attend_run(int64_t begin, int64_t end, int64_t slot, Part &part) {
        // No tile has slots of sinks and newest tokens: positions go on within one.
        int64_t slots_end = call.layout.num_slots();
        for (int64_t from = begin; from < end;) {
            int64_t to = std::min(from + TILE, end);
            if (from < slots_end && to > slots_end) to = slots_end;
            attend_tile<CODEC>(from, to - from, slot + from - begin, part);
            from = to;
        }
    }

    template <int64_t CODEC> void attend_tile(int64_t from, int64_t count, int64_t slot, Part &part) {
        if (!look(from, count)) return;
        const float *rows = read_rows<CODEC>(0, call.key_width, kd, slot, count, keys.data());
        Vector scale = read_scales<CODEC>(1, slot, count), low = read_lows<CODEC>(1, slot, count);
        for (int64_t r = 0; r < call.rows(); r++) score<CODEC>(r, rows, scale, low, part);
        rows = read_rows<CODEC>(2, call.value_width, vd, slot, count, values.data());
        scale = read_scales<CODEC>(3, slot, count), low = read_lows<CODEC>(3, slot, count);
        int64_t r = 0;
        for (; r + MOST_ROWS <= call.rows(); r += MOST_ROWS) add<CODEC, MOST_ROWS>(r, rows, scale, low, part);
        for (; r < call.rows(); r++) add<CODEC, 1>(r, rows, scale, low, part);
    }

    // The tile's rows of one plane as float32 `[16, padded]`, without their scales; nothing where no query sees a token:
    // what a value holds that nobody sees must not reach the sum, where 0 x NaN is NaN.
    template <int64_t CODEC>
    inline const float *read_rows(int64_t plane, int64_t width, int64_t padded, int64_t slot, int64_t count, float *out) {
        int64_t bytes = row_bytes(CODEC, width);
        const char *data = call.planes[plane] + slot * bytes;
        if (CODEC == NONE_F32 && sees_all && width == padded) return reinterpret_cast<const float *>(data);
        for (int64_t t = 0; t < TILE; t++) {
            if (t < count && is_token_seen[t]) {
                read_row<CODEC>(data + t * bytes, width, out + t * padded);
            } else {
                std::fill_n(out + t * padded, padded, 0.0f);
            }
        }
        return out;
    }

    template <int64_t CODEC> inline Vector read_scales(int64_t plane, int64_t slot, int64_t count) {
        const uint16_t *scales = reinterpret_cast<const uint16_t *>(call.planes[plane]);
        if (CODEC == INT4) return (Vector)(read_pairs(scales, slot, count) << 16);
        Vector found = all(1.0f);
        if (CODEC != INT8 && CODEC != FP8) return found;
        if (sees_all) return (Vector)(widen_halves(scales + slot) << 16);
        for (int64_t t = 0; t < TILE; t++) found[t] = t < count && is_token_seen[t] ? from_bf16(scales[slot + t]) : 0.0f;
        return found;
    }

    // What is added to a row of int4, whose numbers are read less 8.
    template <int64_t CODEC> inline Vector read_lows(int64_t plane, int64_t slot, int64_t count) {
        if (CODEC != INT4) return all(0.0f);
        Naturals pairs = read_pairs(reinterpret_cast<const uint16_t *>(call.planes[plane]), slot, count);
        return (Vector)(pairs & 0xFFFF0000u) + 8.0f * (Vector)(pairs << 16);
    }

    // The scales, below, and the lows, above, of a tile's tokens; 0 of those that nobody sees.
    inline Naturals read_pairs(const uint16_t *scales, int64_t slot, int64_t count) {
        if (sees_all) return load<Naturals>(scales + 2 * slot);
        Naturals pairs = {};
        for (int64_t t = 0; t < count; t++) {
            if (is_token_seen[t]) pairs[t] = load<uint32_t>(scales + 2 * (slot + t));
        }
        return pairs;
    }

    // Whether a query sees all of the positions `begin .. end - 1`, none of them a slot.
    bool is_within(int64_t n, int64_t begin, int64_t end) const {
        bool is_above = !call.bounds || begin >= call.bounds[b * call.bounds_stride + n];
        return begin >= call.layout.pads(b) && is_above && end <= call.layout.seen() - call.queries + n + 1;
    }

    // Finds which of `count` tokens from index `from` on each query sees; whether any sees any.
    bool look(int64_t from, int64_t count) {
        const Meta &layout = call.layout;
        if (!call.mask && from >= layout.num_slots()) {
            int64_t begin = layout.held_from() + from - layout.num_slots(), end = begin + count;
            if (end <= layout.pads(b)) return false;
            sees_all = count == TILE;
            for (int64_t n = 0; n < call.queries && sees_all; n++) sees_all = is_within(n, begin, end);
            if (sees_all) {
                std::fill_n(is_token_seen, TILE, true);
                return true;
            }
        }
        sees_all = !call.mask && count == TILE;
        std::fill_n(is_token_seen, TILE, false);
        visible.assign((call.mask && call.mask_strides[1] ? call.rows() : call.queries) * TILE, 0);
        bool any = false;
        int64_t pads = layout.pads(b);
        bool is_slot = from < layout.num_slots();
        int64_t position = is_slot ? pads + from : layout.held_from() + from - layout.num_slots();
        int64_t looks = int64_t(visible.size()) / TILE;
        for (int64_t r = 0; r < looks; r++) {
            int64_t n = r % call.queries, t = layout.seen() - call.queries + n;
            int64_t bound = call.bounds ? call.bounds[b * call.bounds_stride + n] : INT64_MIN;
            for (int64_t i = 0; i < count; i++) {
                int64_t j = position + i;
                bool is_seen;
                if (call.mask) {
                    int64_t head = h * call.groups + r / call.queries;
                    int64_t at = b * call.mask_strides[0] + head * call.mask_strides[1] + n * call.mask_strides[2];
                    is_seen = call.mask[at + from + i - layout.first()];
                } else {
                    is_seen = j >= pads && j <= t && (j >= bound || j < pads + layout.sinks());
                    is_seen = is_seen && (!is_slot || j < layout.held_from());
                }
                visible[r * TILE + i] = is_seen ? -1 : 0;
                is_token_seen[i] |= is_seen;
                any |= is_seen;
                sees_all &= is_seen;
            }
        }
        return any;
    }

    // Scores of one query against the tile's tokens, as weights; what was summed is made smaller if they are larger.
    template <int64_t CODEC> inline void score(int64_t r, const float *rows, Vector scale, Vector low, Part &part) {
        Vector products[TILE];
#pragma GCC unroll 16
        for (int64_t t = 0; t < TILE; t++) products[t] = all(0.0f);
        const float *q = &query[r * kd];
        for (int64_t i = 0; i < kd; i += LANES) {
            Vector of_query = load<Vector>(q + i);
#pragma GCC unroll 16
            for (int64_t t = 0; t < TILE; t++) products[t] += of_query * load<Vector>(rows + t * kd + i);
        }
        Vector scores = sums_of(products);
        if (CODEC == INT8 || CODEC == FP8) scores *= scale;
        if (CODEC == INT4) scores = scores * scale + low * sums[r];
        if (call.softcap > 0) {
            for (int64_t t = 0; t < TILE; t++) scores[t] = call.softcap * std::tanh(scores[t] / call.softcap);
        }
        if (!sees_all) {
            // Of all heads where the mask tells them apart, else of the queries alone.
            scores = select(load<Integers>(&visible[r * TILE % int64_t(visible.size())]), scores, all(-INFINITY));
        }
        float largest = largest_of(select(scores == scores, scores, all(-INFINITY)), part.largest[r]);
        if (largest > part.largest[r]) {
            float by = std::exp(part.largest[r] - largest);
            part.largest[r] = largest;
            part.sum[r] *= by;
            float *out = &part.out[r * vd];
            for (int64_t i = 0; i < vd; i++) out[i] *= by;
        }
        Vector weight = exp(scores - largest);
        if (largest == -INFINITY) weight = select(scores == scores, all(0.0f), scores);
        store(&weights[r * TILE], weight);
        part.sum[r] += sum_of(weight);
    }

    template <int64_t CODEC, int64_t ROWS>
    inline void add(int64_t r, const float *rows, Vector scale, Vector low, Part &part) {
        float scaled[ROWS * TILE], offsets[ROWS];
        for (int64_t i = 0; i < ROWS; i++) {
            Vector weight = load<Vector>(&weights[(r + i) * TILE]);
            store(scaled + i * TILE, weight * scale);
            offsets[i] = CODEC == INT4 ? sum_of(weight * low) : 0.0f;
        }
        for (int64_t at = 0; at < vd; at += LANES) {
            Vector sum[ROWS];
            for (int64_t i = 0; i < ROWS; i++) sum[i] = load<Vector>(&part.out[(r + i) * vd + at]) + offsets[i];
#pragma GCC unroll 16
            for (int64_t t = 0; t < TILE; t++) {
                Vector value = load<Vector>(rows + t * vd + at);
                for (int64_t i = 0; i < ROWS; i++) sum[i] += scaled[i * TILE + t] * value;
            }
            for (int64_t i = 0; i < ROWS; i++) store(&part.out[(r + i) * vd + at], sum[i]);
        }
    }

    const Call &call;
    int64_t b, h, kd, vd;
    std::vector<float> query, sums, keys, values, weights;
    std::vector<int32_t> visible;
    bool is_token_seen[TILE], sees_all = false;
};

// Adds up the stretches of one row and kv head, in their order, and writes the output `[B, q, Hq, Dv]`.
void finish(const Call &call, int64_t b, int64_t h, const Part *parts, int64_t count) {
    int64_t vd = call.padded(call.value_width);
    std::vector<float> out(vd);
    for (int64_t r = 0; r < call.rows(); r++) {
        int64_t head = h * call.groups + r / call.queries, n = r % call.queries;
        float largest = -INFINITY, sum = 0;
        for (int64_t s = 0; s < count; s++) largest = std::max(largest, parts[s].largest[r]);
        if (call.sink_logits) largest = std::max(largest, call.sink_logits[head]);
        std::fill(out.begin(), out.end(), 0.0f);
        for (int64_t s = 0; s < count; s++) {
            bool is_nothing = parts[s].largest[r] == -INFINITY && parts[s].sum[r] == 0;
            if (is_nothing) continue;
            float by = parts[s].largest[r] == largest ? 1.0f : std::exp(parts[s].largest[r] - largest);
            sum += parts[s].sum[r] * by;
            for (int64_t i = 0; i < vd; i++) out[i] += parts[s].out[r * vd + i] * by;
        }
        bool has_logit = call.sink_logits && call.sink_logits[head] != -INFINITY;
        if (has_logit) sum += std::exp(call.sink_logits[head] - largest);
        if (sum != 0) {
            for (int64_t i = 0; i < vd; i++) out[i] /= sum;
        }
        if (call.codec == INT4) rotate(out.data(), call.value_width);
        int64_t at = ((b * call.queries + n) * call.heads * call.groups + head) * call.value_width;
        for (int64_t i = 0; i < call.value_width; i++) store_number(call.out, call.dtype, at + i, out[i]);
        call.lse[(b * call.heads * call.groups + head) * call.queries + n] = sum == 0 ? -INFINITY : largest + std::log(sum);
    }
}

// Whether all tokens that the layout names lie in the planes.
bool lies_in_planes(const Call &call) {
    const Meta &layout = call.layout;
    if (layout.first() < 0) return false;
    if (!call.columns) return layout.start() >= 0 && layout.start() + layout.length() <= call.capacity;
    for (int64_t column = 0; column < call.columns && layout.begins(column) < layout.length(); column++) {
        if (layout.low(column) < 0 || layout.high(column) > call.capacity) return false;
        for (int64_t b = 0; b < call.batch; b++) {
            if (layout.page(b, column) < 0 || layout.page(b, column) >= call.pages) return false;
        }
    }
    return true;
}

template <int64_t CODEC> void attend(const Call &call) {
    int64_t first = call.layout.first(), last = call.layout.length();
    int64_t stretches = std::max<int64_t>((last - first + STRETCH - 1) / STRETCH, 1);
    int64_t tasks = call.batch * call.heads * stretches;
    std::vector<Part> parts(tasks);
    int64_t threads = std::max<int64_t>(std::min(call.threads, tasks), 1);
    // What takes less than a thread needs to wake up.
    if (call.batch * call.heads * (last - first) * (call.key_width + call.value_width) < 1 << 17) threads = 1;
    std::atomic<bool> has_memory{true};
    Pool::shared().run(threads, tasks, [&](int64_t index) {
        int64_t stretch = index % stretches, h = index / stretches % call.heads, b = index / stretches / call.heads;
        int64_t begin = first + stretch * STRETCH;
        try {
            Task(call, b, h).template attend<CODEC>(begin, std::min(begin + STRETCH, last), parts[index]);
            if (stretches == 1) finish(call, b, h, &parts[index], 1);
        } catch (const std::bad_alloc &) {
            has_memory = false;
        }
    });
    if (!has_memory) throw std::bad_alloc();
    if (stretches == 1) return;
    for (int64_t index = 0; index < call.batch * call.heads; index++) {
        finish(call, index / call.heads, index % call.heads, &parts[index * stretches], stretches);
    }
}

}  // namespace
}  // namespace hfkv

// Writes the output `[B, q, Hq, Dv]` and its log-sum-exp `[B, Hq, q]`; 1 where the layout is not one of these planes, 2
// where there is no memory for what is summed.
// shape: rows, columns, kv heads, query heads of each, queries, widths of keys and values, codec, dtype of queries,
// capacity of a row or page, threads, strides of the queries (rows, heads, queries), of the mask (the same) and of the
// bounds (rows), pages.
extern "C" int hfkv_attend(const int64_t *shape, const int32_t *meta, const void *query, const void *key_data,
                            const void *key_scales, const void *value_data, const void *value_scales,
                            const int64_t *bounds, const uint8_t *mask, const float *sink_logits, float scale,
                            float softcap, void *out, float *lse) {
    using namespace hfkv;
    Call call;
    std::memcpy(&call.batch, shape, 11 * sizeof(int64_t));
    std::memcpy(call.query_strides, shape + 11, 3 * sizeof(int64_t));
    std::memcpy(call.mask_strides, shape + 14, 3 * sizeof(int64_t));
    call.bounds_stride = shape[17], call.pages = shape[18];
    call.scale = scale, call.softcap = softcap;
    call.layout = Meta{meta, call.batch, call.columns};
    call.query = static_cast<const char *>(query);
    const void *planes[4] = {key_data, key_scales, value_data, value_scales};
    for (int i = 0; i < 4; i++) call.planes[i] = static_cast<const char *>(planes[i]);
    call.bounds = bounds, call.mask = mask, call.sink_logits = sink_logits;
    call.out = static_cast<char *>(out), call.lse = lse;
    if (!lies_in_planes(call)) return 1;
    try {
        switch (call.codec) {
        case NONE_F32: attend<NONE_F32>(call); break;
        case NONE_BF16: attend<NONE_BF16>(call); break;
        case INT8: attend<INT8>(call); break;
        case FP8: attend<FP8>(call); break;
        default: attend<INT4>(call);
        }
    } catch (const std::bad_alloc &) {
        return 2;
    }
    return 0;
}
