// The work of one thread at a time: a stretch of tokens of one row and kv head.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "call.h"
#include "floats.h"
#include "halves.h"
#include "products.h"
#include "rows.h"
#include "sight.h"

namespace hfkv {

template <int64_t CODEC> class Task {
    static constexpr bool IS_CODED = CODEC == INT8 || CODEC == INT4, IS_HALVES = CODEC == NONE_BF16 || CODEC == FP8;
    // Whether 64 tokens at a time are multiplied as they are stored; else 16 become float32.
    static constexpr bool HAS_PRODUCTS = (HFKV_HAS_INTEGERS && IS_CODED) || (HFKV_HAS_HALVES && IS_HALVES);

  public:
    // Of a tile of the query heads of a kv head: number `head` of all tiles.
    Task(const Call &call, int64_t row, int64_t head)
        : call(call), b(row), h(head), kv_head(row * call.heads + head / call.tiles), sight(call, row, head) {
        vd = call.padded(call.value_width);
        sums.assign(2 * call.rows(), 0.0f), offsets.assign(call.rows(), 0.0f);
        weights.assign(call.rows() * TILE, 0.0f), largest.assign(call.rows(), 0.0f);
        tile.resize(call.rows() * MOST_TILE / LANES);
        has_products = num_multiplied > 0;
        for (int64_t part = 0; part < parts; part++) {
            queries[part].assign(call.rows() * padded(part), 0.0f);
            keys[part].assign(TILE * padded(part), 0.0f);
            for (int64_t r = 0; r < call.rows(); r++) take(part, r);
        }
        if (!call.is_latent()) values.assign(TILE * vd, 0.0f);
    }

    void attend(int64_t begin, int64_t end, Part &part) {
        part.out.assign(call.rows() * vd, 0.0f);
        part.largest.assign(call.rows(), -INFINITY), part.sum.assign(call.rows(), 0.0f);
        attend_tokens(begin, end, part);
#if HFKV_HAS_INTEGERS
        for (int64_t r = 0; r < call.rows() && has_products; r++) of_values.finish(r, &part.out[r * vd]);
#endif
    }

  private:
    // Of keys, or of the rotary keys beside latents: which planes, and how wide.
    static int64_t plane_of(int64_t part) { return part ? 4 : 0; }
    int64_t width(int64_t part) const { return part ? call.rotary_width : call.key_width; }
    int64_t padded(int64_t part) const { return call.padded(width(part)); }
    int64_t bytes(int64_t part) const { return row_bytes(CODEC, width(part)); }

    // Reads what a query meets one part of the keys with.
    void take(int64_t part, int64_t r) {
        float *q = &queries[part][r * padded(part)], sum = 0;
        int64_t at = b * call.query_strides[0] + (h * call.groups + r / call.queries) * call.query_strides[1];
        at += r % call.queries * call.query_strides[2] + part * call.key_width;
        load_numbers(call.query, call.dtype, at, width(part), q);
        if (CODEC == INT4) rotate(q, width(part));
#if HFKV_HAS_INTEGERS
        has_products = has_products && of_keys[part].take(r, q);
#endif
        for (int64_t i = 0; i < width(part); i++) sum += q[i] *= call.scale;
#if HFKV_HAS_INTEGERS
        if (IS_CODED && has_products) sum = of_keys[part].sum(r) * call.scale;
#endif
        sums[part * call.rows() + r] = sum;
    }

    void attend_tokens(int64_t begin, int64_t end, Part &part) {
        const Meta &layout = call.layout;
        if (!call.columns) {
            int64_t slot = kv_head * call.capacity + layout.start();
            return attend_run(begin, end, slot + begin, slot + end, part);
        }
        int64_t column = 0;
        // There may be room for more columns than hold anything: they begin nowhere.
        while (column + 1 < call.columns && layout.begins(column + 1) <= begin &&
               layout.high(column + 1) > layout.low(column + 1)) {
            column++;
        }
        auto slot_of = [&](int64_t at) {
            return (layout.page(b, at) * call.heads + h / call.tiles) * call.capacity + layout.low(at);
        };
        for (; column < call.columns && layout.begins(column) < end; column++) {
            int64_t first = layout.begins(column), last = first + layout.high(column) - layout.low(column);
            int64_t from = std::max(first, begin), to = std::min(last, end);
            if (from >= to) continue;
            int64_t slot = slot_of(column) + from - first;
            attend_run(from, to, slot, to < end && column + 1 < call.columns ? slot_of(column + 1) : slot, part);
        }
    }

    // Tokens `begin .. end - 1`, which lie one after the other from `slot` on; those after them lie from `after` on.
    void attend_run(int64_t begin, int64_t end, int64_t slot, int64_t after, Part &part) {
        // No tile has slots of sinks and newest tokens: positions go on within one.
        int64_t slots_end = call.layout.num_slots(), tile = has_products ? MOST_TILE : TILE;
        for (int64_t from = begin; from < end;) {
            int64_t to = std::min(from + tile, end);
            if (from < slots_end && to > slots_end) to = slots_end;
            next = to < end ? slot + to - begin : after;
            if (sight.look(from, to - from, tile)) {
                (this->*(has_products ? &Task::attend_codes : &Task::attend_tile))(to - from, slot + from - begin, part);
            }
            from = to;
        }
    }

    // Has a plane's part of the next tile fetched: processors do not foresee it where there is so much to compute.
    inline void fetch(int64_t plane, int64_t bytes, int64_t tile) const {
        const char *from = call.planes[plane] + next * bytes;
        for (int64_t i = 0; i < tile * bytes; i += 64) __builtin_prefetch(from + i);
    }

    void attend_tile(int64_t count, int64_t slot, Part &part) {
        const float *rows[2] = {};
        Vector scales[2] = {}, lows[2] = {};
        for (int64_t of = 0; of < parts; of++) {
            rows[of] = read_rows(plane_of(of), width(of), padded(of), slot, count, keys[of].data());
            scales[of] = read_scales(plane_of(of) + 1, slot, count, 0);
            lows[of] = read_lows(plane_of(of) + 1, slot, count, 0);
        }
        int64_t r = 0;
        for (; r + MOST_ROWS <= call.rows(); r += MOST_ROWS) score<MOST_ROWS>(r, rows, scales, lows, part);
        for (; r < call.rows(); r++) score<1>(r, rows, scales, lows, part);
        Vector scale = read_scales(3, slot, count, 0), low = read_lows(3, slot, count, 0);
        const float *of_values =
            call.is_latent() ? rows[0] : read_rows(2, call.value_width, vd, slot, count, values.data());
        if (CODEC == INT4) drop_zeros(slot, scale, low);
        for (r = 0; r + MOST_ROWS <= call.rows(); r += MOST_ROWS) add<MOST_ROWS>(r, of_values, scale, low, part);
        for (; r < call.rows(); r++) add<1>(r, of_values, scale, low, part);
    }

    // The same of a longer tile, by integers.
    void attend_codes(int64_t count, int64_t slot, Part &part) {
#if HFKV_HAS_INTEGERS
        constexpr int64_t VECTORS = MOST_TILE / LANES;
        Vector scales[2][VECTORS], lows[2][VECTORS], value_scales[VECTORS], value_lows[VECTORS];
        for (int64_t of = 0; of < parts; of++) {
            int64_t plane = plane_of(of);
            fetch(plane + 1, scale_bytes(CODEC), MOST_TILE);
            for (int64_t v = 0; v < VECTORS; v++) {
                scales[of][v] = read_scales(plane + 1, slot, count, v);
                lows[of][v] = read_lows(plane + 1, slot, count, v);
            }
            of_keys[of].score(call.planes[plane] + slot * bytes(of), count, call.planes[plane] + next * bytes(of));
        }
        int64_t value_bytes = row_bytes(CODEC, call.value_width);
        const char *values = call.planes[2] + slot * value_bytes;
        fetch(3, scale_bytes(CODEC), MOST_TILE);
        for (int64_t v = 0; v < VECTORS; v++) {
            value_scales[v] = read_scales(3, slot, count, v), value_lows[v] = read_lows(3, slot, count, v);
            if (IS_CODED) drop_zeros(slot + v * LANES, value_scales[v], value_lows[v]);
        }
        // In passes over the rows, so that they do not wait for one another's largest.
        for (int64_t r = 0; r < call.rows(); r++) {
            Vector *scores = &tile[r * VECTORS];
            of_keys[0].scores(r, call.scale, scores);
            scaled<VECTORS>(0, r, scales[0], lows[0], scores);
            if (parts == 2) {
                Vector more[VECTORS];
                of_keys[1].scores(r, call.scale, more);
                scaled<VECTORS>(1, r, scales[1], lows[1], more);
                for (int64_t v = 0; v < VECTORS; v++) scores[v] += more[v];
            }
            limit<VECTORS>(r, scores, part);
        }
        for (int64_t r = 0; r < call.rows(); r++) {
            Vector *weight = &tile[r * VECTORS], offset = all(0.0f);
            weigh<VECTORS>(r, weight, part);
            for (int64_t v = 0; v < VECTORS; v++) {
                offset += weight[v] * value_lows[v];
                weight[v] *= value_scales[v];
            }
            if (CODEC == INT4) offsets[r] = sum_of(offset);
            if (IS_CODED) largest[r] = magnitude_of(reinterpret_cast<const float *>(weight), MOST_TILE);
        }
        of_values.weigh(reinterpret_cast<const float *>(tile.data()), largest.data());
        // What comes after latents is fetched already.
        const char *ahead = call.is_latent() ? nullptr : call.planes[2] + next * value_bytes;
        of_values.add(values, count, ahead, offsets.data(), sight.is_token_seen);
#endif
    }

    // Scores as they are with the scales of the keys of a part, and their lows.
    template <int64_t VECTORS>
    inline void scaled(int64_t part, int64_t r, const Vector *scale, const Vector *low, Vector *scores) const {
        for (int64_t v = 0; v < VECTORS; v++) {
            if (scale_bytes(CODEC)) scores[v] *= scale[v];
            if (CODEC == INT4) scores[v] += low[v] * sums[part * call.rows() + r];
        }
    }

    // The tile's rows of one plane as float32 `[16, padded]`, without their scales; nothing where no query sees a token:
    // what a value holds that nobody sees must not reach the sum, where 0 x NaN is NaN.
    inline const float *read_rows(int64_t plane, int64_t width, int64_t padded, int64_t slot, int64_t count, float *out) {
        int64_t bytes = row_bytes(CODEC, width);
        const char *data = call.planes[plane] + slot * bytes;
        if (CODEC == NONE_F32 && sight.sees_all && width == padded) return reinterpret_cast<const float *>(data);
        for (int64_t t = 0; t < TILE; t++) {
            if (t < count && sight.is_token_seen[t]) {
                read_row<CODEC>(data + t * bytes, width, out + t * padded);
            } else {
                std::fill_n(out + t * padded, padded, 0.0f);
            }
        }
        return out;
    }

    inline Vector read_scales(int64_t plane, int64_t slot, int64_t count, int64_t v) {
        const uint16_t *scales = reinterpret_cast<const uint16_t *>(call.planes[plane]);
        if (CODEC == INT4) return (Vector)(read_pairs(scales, slot, count, v) << 16);
        Vector found = all(1.0f);
        if (CODEC != INT8 && CODEC != FP8) return found;
        if (sight.sees_all) return (Vector)(widen_halves(scales + slot + v * LANES) << 16);
        for (int64_t i = 0, t = v * LANES; i < LANES; i++, t++) {
            found[i] = t < count && sight.is_token_seen[t] ? from_bf16(scales[slot + t]) : 0.0f;
        }
        return found;
    }

    // A value whose numbers are all the same has a scale of 1 and no codes but 0: beside the scale others, of small
    // weights, would be lost, and its own low. It adds that, or nothing.
    inline void drop_zeros(int64_t slot, Vector &scale, Vector &low) {
        int64_t bytes = row_bytes(CODEC, call.value_width);
        const char *values = call.planes[2] + slot * bytes;
        const uint16_t *pairs = reinterpret_cast<const uint16_t *>(call.planes[3]) + 2 * slot;
        for (uint32_t ones = lanes_that_are(1, scale), i = 0; ones; i++, ones >>= 1) {
            const char *row = values + i * bytes;
            if (!(ones & 1) || !std::all_of(row, row + bytes, [](char code) { return !code; })) continue;
            scale[i] = 0;
            if (CODEC == INT4) low[i] = from_bf16(pairs[2 * i + 1]);
        }
    }

    // What is added to a row of int4, whose numbers are read less 8.
    inline Vector read_lows(int64_t plane, int64_t slot, int64_t count, int64_t v) {
        if (CODEC != INT4) return all(0.0f);
        Naturals pairs = read_pairs(reinterpret_cast<const uint16_t *>(call.planes[plane]), slot, count, v);
        return (Vector)(pairs & 0xFFFF0000u) + 8.0f * (Vector)(pairs << 16);
    }

    // The scales, below, and the lows, above, of a tile's tokens; 0 of those that nobody sees.
    inline Naturals read_pairs(const uint16_t *scales, int64_t slot, int64_t count, int64_t v) {
        if (sight.sees_all) return load<Naturals>(scales + 2 * (slot + v * LANES));
        Naturals pairs = {};
        for (int64_t i = 0, t = v * LANES; i < LANES && t < count; i++, t++) {
            if (sight.is_token_seen[t]) pairs[i] = load<uint32_t>(scales + 2 * (slot + t));
        }
        return pairs;
    }

    // Weights of `ROWS` queries for the tile's tokens.
    template <int64_t ROWS>
    inline void score(int64_t r, const float *const *rows, const Vector *scales, const Vector *lows, Part &part) {
        Vector scores[ROWS];
        for (int64_t of = 0; of < parts; of++) {
            Vector products[ROWS];
            Ahead ahead{call.planes[plane_of(of)] + next * bytes(of), r ? 0 : number_bytes(CODEC)};
            multiply_rows<ROWS>(&queries[of][r * padded(of)], rows[of], padded(of), ahead, products);
            for (int64_t i = 0; i < ROWS; i++) {
                scaled<1>(of, r + i, &scales[of], &lows[of], &products[i]);
                scores[i] = of ? scores[i] + products[i] : products[i];
            }
        }
        for (int64_t i = 0; i < ROWS; i++) limit<1>(r + i, &scores[i], part);
        for (int64_t i = 0; i < ROWS; i++) {
            weigh<1>(r + i, &scores[i], part);
            store(&weights[(r + i) * TILE], scores[i]);
        }
    }

    // What is summed is made smaller if a query's scores are larger than those before.
    template <int64_t VECTORS> inline void limit(int64_t r, Vector *scores, Part &part) {
        if (call.softcap > 0) {
            for (int64_t v = 0; v < VECTORS; v++) {
                for (int64_t i = 0; i < LANES; i++) scores[v][i] = call.softcap * std::tanh(scores[v][i] / call.softcap);
            }
        }
        if (!sight.sees_all) {
            for (int64_t v = 0; v < VECTORS; v++) scores[v] = select(sight.of(r, v), scores[v], all(-INFINITY));
        }
        Vector most = all(part.largest[r]);
        for (int64_t v = 0; v < VECTORS; v++) most = larger(scores[v], most);
        float largest = largest_of(most);
        if (largest > part.largest[r]) {
            float by = std::exp(part.largest[r] - largest);
            part.largest[r] = largest;
            part.sum[r] *= by;
            float *out = &part.out[r * vd];
            for (int64_t i = 0; i < vd; i++) out[i] *= by;
#if HFKV_HAS_INTEGERS
            if (has_products) of_values.shrink(r, by);
#endif
        }
    }

    // Turns a query's scores into weights.
    template <int64_t VECTORS> inline void weigh(int64_t r, Vector *scores, Part &part) {
        Vector sum = all(0.0f);
        float largest = part.largest[r];
        for (int64_t v = 0; v < VECTORS; v++) {
            Vector weight = exp(scores[v] - largest);
            if (largest == -INFINITY) weight = select(scores[v] == scores[v], all(0.0f), scores[v]);
            scores[v] = weight;
            sum += weight;
        }
        part.sum[r] += sum_of(sum);
    }

    template <int64_t ROWS> inline void add(int64_t r, const float *rows, Vector scale, Vector low, Part &part) {
        float scaled[ROWS * TILE], offsets[ROWS];
        for (int64_t i = 0; i < ROWS; i++) {
            Vector weight = load<Vector>(&weights[(r + i) * TILE]);
            store(scaled + i * TILE, weight * scale);
            offsets[i] = CODEC == INT4 ? sum_of(weight * low) : 0.0f;
        }
        bool is_fetched = r || call.is_latent();
        Ahead ahead{call.planes[2] + next * row_bytes(CODEC, call.value_width), is_fetched ? 0 : number_bytes(CODEC)};
        add_rows<ROWS>(scaled, offsets, rows, vd, ahead, &part.out[r * vd]);
    }

    const Call &call;
    int64_t b, h, kv_head, vd, next = 0, parts = call.is_latent() ? 2 : 1;
    // One row alone waits for memory: to put pairs in order costs more than it saves (8k tokens, 8 kv heads of 128, one core
    // of an EPYC: bfloat16 1.7 to 2.3 against 1.5 ms; two rows 1.9 against 2.3, four 1.4 against 2.2; fp8 1.3 against 1.2;
    // 1.3 against 1.7, 1.3 against 2.7).
    int64_t num_multiplied = HAS_PRODUCTS && (IS_CODED || call.rows() > 1) ? call.rows() : 0;
    std::vector<float> queries[2], sums, offsets, keys[2], values, weights, largest;
    std::vector<Vector> tile;
    Sight sight;
    bool has_products = false;  // where there are such, and queries that they keep
#if HFKV_HAS_INTEGERS
#if HFKV_HAS_HALVES
    using Keys = std::conditional_t<IS_HALVES, HalfKeys<CODEC>, KeyProducts<CODEC>>;
    using Values = std::conditional_t<IS_HALVES, HalfValues<CODEC>, ValueProducts<CODEC>>;
#else
    using Keys = KeyProducts<CODEC>;
    using Values = ValueProducts<CODEC>;
#endif
    Keys of_keys[2] = {{call, num_multiplied, call.key_width},
                       {call, call.is_latent() ? num_multiplied : 0, call.rotary_width}};
    Values of_values{call, num_multiplied};
#endif
};

}  // namespace hfkv
