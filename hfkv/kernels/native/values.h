// What the weights of a task sum: values, or latents.

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
using ValueFactors = std::conditional_t<is_halves(CODEC), HalfValues<CODEC>, ValueProducts<as_multiplied(CODEC)>>;
#elif HFKV_HAS_INTEGERS
template <int64_t CODEC> using ValueFactors = ValueProducts<as_multiplied(CODEC)>;
#endif

// Values of some codec.
class Values {
  public:
    virtual ~Values() = default;

    // Adds a tile of values times the weights of all queries: `[rows, 4]` vectors by products, which change them, else one
    // each. Their numbers may have been read already.
    virtual void add(const Tokens &tokens, bool has_products, Vector *weights, const float *numbers, float *out) = 0;

    // Makes what products were added up for a query smaller.
    virtual void shrink(int64_t r, float by) = 0;

    // What products came to, to `out[rows, padded]`.
    virtual void finish(float *out) = 0;
};

template <int64_t CODEC> class ValuesOf final : public Values {
  public:
    // Values in the planes 2 and 3; with products, of so many rows.
    ValuesOf(const Call &call, const Sight &sight, int64_t multiplied)
        : call(call), sight(sight), multiplied(multiplied), stored(call, sight, 2, call.value_width) {
        if (!call.is_latent()) rows.assign(TILE * stored.padded, 0.0f);
        offsets.assign(call.rows(), 0.0f), largest.assign(call.rows(), 0.0f);
    }

    void add(const Tokens &tokens, bool by_products, Vector *weights, const float *numbers, float *out) override {
#if HFKV_HAS_INTEGERS
        if constexpr (has_products(CODEC)) {
            if (by_products) return multiply(tokens, weights);
        }
#endif
        Vector scale = stored.scales(tokens, 0), low = stored.lows(tokens, 0);
        const float *values = numbers ? numbers : stored.rows(tokens, rows.data());
        if (CODEC == INT4) stored.drop_zeros(tokens.slot, scale, low);
        int64_t r = 0;
        for (; r + MOST_ROWS <= call.rows(); r += MOST_ROWS) {
            add_to<MOST_ROWS>(r, tokens, weights, values, scale, low, !numbers, out);
        }
        for (; r < call.rows(); r++) add_to<1>(r, tokens, weights, values, scale, low, !numbers, out);
    }

    void shrink(int64_t r, float by) override {
#if HFKV_HAS_INTEGERS
        if constexpr (has_products(CODEC)) factors.shrink(r, by);
#endif
    }

    void finish(float *out) override {
#if HFKV_HAS_INTEGERS
        if constexpr (has_products(CODEC)) {
            for (int64_t r = 0; r < call.rows(); r++) factors.finish(r, out + r * stored.padded);
        }
#endif
    }

  private:
    template <int64_t ROWS>
    inline void add_to(int64_t r, const Tokens &tokens, const Vector *weights, const float *values, Vector scale, Vector low,
                       bool fetches, float *out) {
        float scaled[ROWS * TILE], sums[ROWS];
        for (int64_t i = 0; i < ROWS; i++) {
            store(scaled + i * TILE, weights[r + i] * scale);
            sums[i] = CODEC == INT4 ? sum_of(weights[r + i] * low) : 0.0f;
        }
        Ahead ahead{stored.at(tokens.next), r || !fetches ? 0 : number_bytes(CODEC)};
        add_rows<ROWS>(scaled, sums, values, stored.padded, ahead, out + r * stored.padded);
    }

#if HFKV_HAS_INTEGERS
    // The same of a longer tile, by products of what is stored.
    void multiply(const Tokens &tokens, Vector *weights) {
        constexpr int64_t VECTORS = MOST_TILE / LANES;
        Vector scales[VECTORS], lows[VECTORS];
        stored.fetch_scales(tokens.next);
        for (int64_t v = 0; v < VECTORS; v++) {
            scales[v] = stored.scales(tokens, v), lows[v] = stored.lows(tokens, v);
            if (is_coded(CODEC)) stored.drop_zeros(tokens.slot + v * LANES, scales[v], lows[v]);
        }
        for (int64_t r = 0; r < call.rows(); r++) {
            Vector *weight = weights + r * VECTORS, offset = all(0.0f);
            for (int64_t v = 0; v < VECTORS; v++) {
                offset += weight[v] * lows[v];
                weight[v] *= scales[v];
            }
            if (CODEC == INT4) offsets[r] = sum_of(offset);
            if (is_coded(CODEC)) largest[r] = magnitude_of(reinterpret_cast<const float *>(weight), MOST_TILE);
        }
        factors.weigh(reinterpret_cast<const float *>(weights), largest.data());
        // What comes after latents is fetched already.
        const char *ahead = call.is_latent() ? nullptr : stored.at(tokens.next);
        const char *values = stored.at(tokens.slot);
        if constexpr (is_packed(CODEC)) values = unpacked.read(values, tokens.count, stored.at(tokens.next)), ahead = nullptr;
        factors.add(values, tokens.count, ahead, offsets.data(), sight.is_token_seen);
    }
#endif

    const Call &call;
    const Sight &sight;
    int64_t multiplied;
    Stored<CODEC> stored;
    std::vector<float> rows, offsets, largest;
#if HFKV_HAS_INTEGERS
    using Factors = std::conditional_t<has_products(CODEC), ValueFactors<CODEC>, Nothing>;
    Factors factors{call, multiplied};
    std::conditional_t<is_packed(CODEC), Unpacked<CODEC>, Nothing> unpacked{stored.width};
#endif
};

inline std::unique_ptr<Values> values_of(int64_t codec, const Call &call, const Sight &sight, int64_t multiplied) {
    switch (codec) {
    case NONE_F32: return std::make_unique<ValuesOf<NONE_F32>>(call, sight, multiplied);
    case NONE_BF16: return std::make_unique<ValuesOf<NONE_BF16>>(call, sight, multiplied);
    case INT8: return std::make_unique<ValuesOf<INT8>>(call, sight, multiplied);
    case FP8: return std::make_unique<ValuesOf<FP8>>(call, sight, multiplied);
    case INT4: return std::make_unique<ValuesOf<INT4>>(call, sight, multiplied);
    case INT3: return std::make_unique<ValuesOf<INT3>>(call, sight, multiplied);
    default: return std::make_unique<ValuesOf<INT2>>(call, sight, multiplied);
    }
}

}  // namespace hfkv
