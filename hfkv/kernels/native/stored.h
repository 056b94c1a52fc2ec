// Tokens as one codec has stored them, a tile at a time.

#pragma once

#include <algorithm>

#include "call.h"
#include "halves.h"
#include "integers.h"
#include "rows.h"
#include "sight.h"

namespace hfkv {

// Whether rows are first unpacked to bytes, which are then multiplied as those of int8.
constexpr bool is_packed(int64_t codec) { return codec == INT3 || codec == INT2; }

constexpr int64_t as_multiplied(int64_t codec) { return is_packed(codec) ? int64_t(INT8) : codec; }

constexpr bool is_coded(int64_t codec) { return codec == INT8 || codec == INT4 || is_packed(codec); }

constexpr bool is_halves(int64_t codec) { return codec == NONE_BF16 || codec == FP8; }

// Whether 64 tokens at a time can be multiplied as they are stored; else 16 become float32.
constexpr bool has_products(int64_t codec) {
    return (HFKV_HAS_INTEGERS && is_coded(codec)) || (HFKV_HAS_HALVES && is_halves(codec));
}

// Whether it is worth it, for queries of a dtype that it keeps. One row alone waits for memory: to put pairs in order costs
// more than it saves (8k tokens, 8 kv heads of 128, one core of an EPYC: bfloat16 1.7 to 2.3 against 1.5 ms; two rows 1.9
// against 2.3, four 1.4 against 2.2; fp8 1.3 against 1.2; 1.3 against 1.7, 1.3 against 2.7).
inline bool takes_products(const Call &call, int64_t codec) {
    return has_products(codec) && (is_coded(codec) || (call.rows() > 1 && call.dtype == BF16));
}

// What stands where there are no products.
struct Nothing {
    template <typename... Given> explicit Nothing(const Given &...) {}
};

// Tokens that are read at once: where the first one lies, how many there are, and where those lie that are read next.
struct Tokens {
    int64_t slot, count, next;
};

// The keys of one head, its values, its latents or the rotary keys beside these.
template <int64_t CODEC> class Stored {
  public:
    // Those that lie in two of the planes, from number `plane` on.
    Stored(const Call &call, const Sight &sight, int64_t plane, int64_t width)
        : width(width), padded(call.padded(width)), bytes(row_bytes(CODEC, width)), sight(sight),
          data(call.planes[plane]), of_scales(reinterpret_cast<const uint16_t *>(call.planes[plane + 1])) {}

    const char *at(int64_t slot) const { return data + slot * bytes; }

    // Has a tile of scales fetched: processors do not foresee it where there is so much to compute.
    inline void fetch_scales(int64_t slot) const {
        const char *from = reinterpret_cast<const char *>(of_scales) + slot * scale_bytes(CODEC);
        for (int64_t i = 0; i < MOST_TILE * scale_bytes(CODEC); i += 64) __builtin_prefetch(from + i);
    }

    // Up to 16 rows as float32 `[16, padded]`, without their scales; nothing where no query sees a token: what a value
    // holds that nobody sees must not reach the sum, where 0 x NaN is NaN.
    inline const float *rows(const Tokens &tokens, float *out) const {
        if (CODEC == NONE_F32 && sight.sees_all && width == padded) {
            return reinterpret_cast<const float *>(at(tokens.slot));
        }
        for (int64_t t = 0; t < TILE; t++) {
            if (t < tokens.count && sight.is_token_seen[t]) {
                read_row<CODEC>(at(tokens.slot + t), width, out + t * padded);
            } else {
                std::fill_n(out + t * padded, padded, 0.0f);
            }
        }
        return out;
    }

    // The scales of the tile's vector number `v`.
    inline Vector scales(const Tokens &tokens, int64_t v) const {
        if (CODEC == INT4) return (Vector)(pairs(tokens, v) << 16);
        Vector found = all(1.0f);
        if (is_packed(CODEC)) return log_scales_of(tokens, v);
        if (CODEC != INT8 && CODEC != FP8) return found;
        if (sight.sees_all) return (Vector)(widen_halves(of_scales + tokens.slot + v * LANES) << 16);
        for (int64_t i = 0, t = v * LANES; i < LANES; i++, t++) {
            bool is_read = t < tokens.count && sight.is_token_seen[t];
            found[i] = is_read ? from_bf16(of_scales[tokens.slot + t]) : 0.0f;
        }
        return found;
    }

    // What is added to a row of int4, whose numbers are read less 8.
    inline Vector lows(const Tokens &tokens, int64_t v) const {
        if (CODEC != INT4) return all(0.0f);
        Naturals both = pairs(tokens, v);
        return (Vector)(both & 0xFFFF0000u) + 8.0f * (Vector)(both << 16);
    }

    // A row whose numbers are all the same has a scale of 1 and no codes but 0: beside the scale others, of small weights,
    // would be lost, and its own low. It adds that, or nothing.
    inline void drop_zeros(int64_t slot, Vector &scale, Vector &low) const {
        if (is_packed(CODEC)) return;  // of zeros the scale is zero
        for (uint32_t ones = lanes_that_are(1, scale), i = 0; ones; i++, ones >>= 1) {
            const char *row = at(slot + i);
            if (!(ones & 1) || !std::all_of(row, row + bytes, [](char code) { return !code; })) continue;
            scale[i] = 0;
            if (CODEC == INT4) low[i] = from_bf16(of_scales[2 * (slot + i) + 1]);
        }
    }

    const int64_t width, padded, bytes;

  private:
    // Scales of eight bits; 0 of tokens that nobody sees.
    inline Vector log_scales_of(const Tokens &tokens, int64_t v) const {
        const uint8_t *from = reinterpret_cast<const uint8_t *>(of_scales) + tokens.slot;
        if (sight.sees_all) return from_log_scales(widen_codes(from + v * LANES));
        Naturals found = {};
        for (int64_t i = 0, t = v * LANES; i < LANES && t < tokens.count; i++, t++) {
            if (sight.is_token_seen[t]) found[i] = from[t];
        }
        return from_log_scales(found);
    }

    // The scales, below, and the lows, above, of a tile's tokens; 0 of those that nobody sees.
    inline Naturals pairs(const Tokens &tokens, int64_t v) const {
        if (sight.sees_all) return load<Naturals>(of_scales + 2 * (tokens.slot + v * LANES));
        Naturals found = {};
        for (int64_t i = 0, t = v * LANES; i < LANES && t < tokens.count; i++, t++) {
            if (sight.is_token_seen[t]) found[i] = load<uint32_t>(of_scales + 2 * (tokens.slot + t));
        }
        return found;
    }

    const Sight &sight;
    const char *data;
    const uint16_t *of_scales;
};

}  // namespace hfkv
