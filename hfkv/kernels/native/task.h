// The work of one thread at a time: a stretch of tokens of one row and kv head.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "call.h"
#include "key_mean.h"
#include "keys.h"
#include "sight.h"
#include "values.h"

namespace hfkv {

class Task {
  public:
    // Of a tile of the query heads of a kv head: number `head` of all tiles.
    Task(const Call &call, int64_t row, int64_t head)
        : call(call), b(row), h(head), kv_head(row * call.heads + head / call.tiles), vd(call.padded(call.value_width)),
          sight(call, row, head) {
        has_products = takes_products(call, call.key_codec) && takes_products(call, call.value_codec);
        int64_t multiplied = has_products ? call.rows() : 0;
        keys[0] = keys_of(call.key_codec, call, sight, 0, call.key_width, 0, multiplied);
        if (call.is_latent()) {
            keys[1] = keys_of(call.value_codec, call, sight, 4, call.rotary_width, call.key_width, multiplied);
        }
        values = values_of(call.summed_codec(), call, sight, multiplied);
        for (int64_t of = 0; of < parts; of++) has_products = keys[of]->take(b, h) && has_products;
        if (call.mean.vector) mean = std::make_unique<MeanScores>(call, b, h);
        tile.resize(call.rows() * (has_products ? MOST_TILE : TILE) / LANES);
    }

    void attend(int64_t begin, int64_t end, Part &part) {
        last = end;
        part.out.assign(call.rows() * vd, 0.0f);
        part.largest.assign(call.rows(), -INFINITY), part.sum.assign(call.rows(), 0.0f);
        attend_tokens(begin, end, part);
        if (has_products) values->finish(part.out.data());
    }

  private:
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
        // No tile has slots of sinks and newest tokens: positions go on within one, those of the mean too.
        int64_t slots_end = call.layout.num_slots(), tile = has_products ? MOST_TILE : TILE;
        int64_t mean_end = mean ? call.mean.num_slots() : 0;
        for (int64_t from = begin; from < end;) {
            int64_t to = std::min(from + tile, end);
            if (from < slots_end && to > slots_end) to = slots_end;
            if (from < mean_end && to > mean_end) to = mean_end;
            Tokens tokens{slot + from - begin, to - from, to < end ? slot + to - begin : after};
            if (sight.look(from, to - from, tile)) {
                has_products ? attend_tile<MOST_TILE / LANES>(from, tokens, part) : attend_tile<1>(from, tokens, part);
            }
            from = to;
        }
    }

    template <int64_t VECTORS> void attend_tile(int64_t from, const Tokens &tokens, Part &part) {
        for (int64_t of = 0; of < parts; of++) keys[of]->score(tokens, has_products, of > 0, tile.data());
        if (mean) mean->add<VECTORS>(from, tokens.count, last, tile.data());
        // In passes over the rows, so that they do not wait for one another's largest.
        for (int64_t r = 0; r < call.rows(); r++) limit<VECTORS>(r, &tile[r * VECTORS], part);
        for (int64_t r = 0; r < call.rows(); r++) weigh<VECTORS>(r, &tile[r * VECTORS], part);
        // Latents have been read.
        const float *numbers = call.is_latent() ? keys[0]->numbers : nullptr;
        values->add(tokens, has_products, tile.data(), numbers, part.out.data());
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
            if (has_products) values->shrink(r, by);
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

    const Call &call;
    int64_t b, h, kv_head, vd, parts = call.is_latent() ? 2 : 1, last = 0;
    Sight sight;
    std::unique_ptr<Keys> keys[2];  // latents are in two parts
    std::unique_ptr<MeanScores> mean;  // where one was taken off the keys
    std::unique_ptr<Values> values;
    std::vector<Vector> tile;  // scores, then weights
    bool has_products;  // whether there are such, and queries that they keep
};

}  // namespace hfkv
