// What the queries of a task meet: keys, latents, or the rotary keys beside these.

#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "floats.h"
#include "products.h"
#include "stored.h"
#include "unpacked.h"

namespace hfkv {

#if HFKV_HAS_HALVES
template <int64_t CODEC>
using KeyFactors = std::conditional_t<is_halves(CODEC), HalfKeys<CODEC>, KeyProducts<as_multiplied(CODEC), is_rotated(CODEC)>>;
#elif HFKV_HAS_INTEGERS
template <int64_t CODEC> using KeyFactors = KeyProducts<as_multiplied(CODEC), is_rotated(CODEC)>;
#endif

// Keys of some codec. To tell codecs apart here costs a call for each tile, and saves a task for every two of them.
class Keys {
  public:
    virtual ~Keys() = default;

    // Takes the queries of a row and head, scaled; whether products keep them.
    virtual bool take(int64_t b, int64_t h) = 0;

    // Sets the scores of all queries for a tile of tokens, or adds to them: `[rows, 4]` vectors by products, else one each.
    virtual void score(const Tokens &tokens, bool has_products, bool adds, Vector *scores) = 0;

    // The tile's rows as float32, after scores without products.
    const float *numbers = nullptr;
};

template <int64_t CODEC> class KeysOf final : public Keys {
  public:
    // Keys in two of the planes, which queries meet with their numbers from `first` on; with products, so many rows.
    KeysOf(const Call &call, const Sight &sight, int64_t plane, int64_t width, int64_t first, int64_t multiplied)
        : call(call), first(first), multiplied(multiplied), stored(call, sight, plane, width) {
        queries.assign(call.rows() * stored.padded, 0.0f), sums.assign(call.rows(), 0.0f);
        rows.assign(TILE * stored.padded, 0.0f);
    }

    bool take(int64_t b, int64_t h) override {
        bool keeps = multiplied > 0;
        for (int64_t r = 0; r < call.rows(); r++) {
            float *q = &queries[r * stored.padded], sum = 0;
            int64_t at = b * call.query_strides[0] + (h * call.groups + r / call.queries) * call.query_strides[1];
            at += r % call.queries * call.query_strides[2] + first;
            load_numbers(call.query, call.dtype, at, stored.width, q);
            if (is_rotated(CODEC)) rotate(q, stored.width);
#if HFKV_HAS_INTEGERS
            if constexpr (has_products(CODEC)) keeps = keeps && factors.take(r, q);
#endif
            for (int64_t i = 0; i < stored.width; i++) sum += q[i] *= call.scale;
#if HFKV_HAS_INTEGERS
            if constexpr (has_products(CODEC) && is_coded(CODEC)) {
                if (keeps) sum = factors.sum(r) * call.scale;
            }
#endif
            sums[r] = sum;
        }
        return keeps;
    }

    void score(const Tokens &tokens, bool by_products, bool adds, Vector *scores) override {
#if HFKV_HAS_INTEGERS
        if constexpr (has_products(CODEC)) {
            if (by_products) return multiply(tokens, adds, scores);
        }
#endif
        numbers = stored.rows(tokens, rows.data());
        Vector scale = stored.scales(tokens, 0), low = stored.lows(tokens, 0);
        int64_t r = 0;
        for (; r + MOST_ROWS <= call.rows(); r += MOST_ROWS) score_rows<MOST_ROWS>(r, tokens, scale, low, adds, scores);
        for (; r < call.rows(); r++) score_rows<1>(r, tokens, scale, low, adds, scores);
    }

  private:
    template <int64_t ROWS>
    inline void score_rows(int64_t r, const Tokens &tokens, Vector scale, Vector low, bool adds, Vector *scores) {
        Vector products[ROWS];
        Ahead ahead{stored.at(tokens.next), r ? 0 : number_bytes(CODEC)};
        multiply_rows<ROWS>(&queries[r * stored.padded], numbers, stored.padded, ahead, products);
        for (int64_t i = 0; i < ROWS; i++) {
            Vector own = scaled(r + i, scale, low, products[i]);
            scores[r + i] = adds ? scores[r + i] + own : own;
        }
    }

#if HFKV_HAS_INTEGERS
    // The same of a longer tile, by products of what is stored.
    void multiply(const Tokens &tokens, bool adds, Vector *scores) {
        constexpr int64_t VECTORS = MOST_TILE / LANES;
        Vector scales[VECTORS], lows[VECTORS], own[VECTORS];
        stored.fetch_scales(tokens.next);
        for (int64_t v = 0; v < VECTORS; v++) scales[v] = stored.scales(tokens, v), lows[v] = stored.lows(tokens, v);
        const char *keys = stored.at(tokens.slot), *ahead = stored.at(tokens.next);
        if constexpr (is_packed(CODEC)) keys = unpacked.read(keys, tokens.count, ahead), ahead = nullptr;
        factors.score(keys, tokens.count, ahead);
        for (int64_t r = 0; r < call.rows(); r++, scores += VECTORS) {
            factors.scores(r, call.scale, own);
            for (int64_t v = 0; v < VECTORS; v++) {
                own[v] = scaled(r, scales[v], lows[v], own[v]);
                scores[v] = adds ? scores[v] + own[v] : own[v];
            }
        }
    }
#endif

    // Scores of a query with the scales of the keys, and their lows.
    inline Vector scaled(int64_t r, Vector scale, Vector low, Vector scores) const {
        if (scale_bytes(CODEC)) scores *= scale;
        if (CODEC == INT4) scores += low * sums[r];
        return scores;
    }

    const Call &call;
    int64_t first, multiplied;
    Stored<CODEC> stored;
    std::vector<float> queries, sums, rows;
#if HFKV_HAS_INTEGERS
    using Factors = std::conditional_t<has_products(CODEC), KeyFactors<CODEC>, Nothing>;
    Factors factors{call, multiplied, stored.width};
    std::conditional_t<is_packed(CODEC), Unpacked<CODEC>, Nothing> unpacked{stored.width};
#endif
};

inline std::unique_ptr<Keys> keys_of(int64_t codec, const Call &call, const Sight &sight, int64_t plane, int64_t width,
                                     int64_t first, int64_t multiplied) {
    switch (codec) {
    case NONE_F32: return std::make_unique<KeysOf<NONE_F32>>(call, sight, plane, width, first, multiplied);
    case NONE_BF16: return std::make_unique<KeysOf<NONE_BF16>>(call, sight, plane, width, first, multiplied);
    case INT8: return std::make_unique<KeysOf<INT8>>(call, sight, plane, width, first, multiplied);
    case FP8: return std::make_unique<KeysOf<FP8>>(call, sight, plane, width, first, multiplied);
    case INT4: return std::make_unique<KeysOf<INT4>>(call, sight, plane, width, first, multiplied);
    case INT3: return std::make_unique<KeysOf<INT3>>(call, sight, plane, width, first, multiplied);
    default: return std::make_unique<KeysOf<INT2>>(call, sight, plane, width, first, multiplied);
    }
}

}  // namespace hfkv
