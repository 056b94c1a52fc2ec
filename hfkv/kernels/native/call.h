// What is asked of attention, and what a stretch of tokens comes to.

#pragma once

#include <vector>

#include "common.h"
#include "vectors.h"

namespace hfkv {

// Tokens that are read at once, and at most where codes are multiplied as integers.
constexpr int64_t TILE = 16, MOST_TILE = 64;

// The mean that was taken off the keys of each kv head, where tokens stand, and by what it is turned: wave_tables.py says
// how these lie.
struct Mean {
    const float *vector = nullptr;  // [heads, width]; none where nothing was taken off
    const int64_t *places;
    const float *tables;

    int64_t pairs() const { return places[0]; }    // a multiple of 16
    int64_t fillers() const { return places[1]; }  // of the pairs the first ones, which are none
    int64_t slow() const { return places[2]; }     // of the pairs the first ones, those among them
    int64_t turns() const { return places[3]; }
    int64_t first(int64_t pair) const { return places[4 + pair]; }
    int64_t second(int64_t pair) const { return places[4 + pairs() + pair]; }
    int64_t num_slots() const { return places[4 + 2 * pairs()]; }
    int64_t shift(int64_t row) const { return places[5 + 2 * pairs() + row]; }
    int64_t position(int64_t row, int64_t i) const { return i < num_slots() ? i : i + shift(row); }
};

// Latents are keys and values of one kv head both, and have rotary keys beside them: a score is the sum of two products.
struct Call {
    int64_t batch, columns, heads, groups, queries, key_width, value_width, key_codec, dtype, capacity, threads;
    int64_t query_strides[3], mask_strides[3], bounds_stride, pages, rotary_width, value_codec;
    int64_t tiles = 1;  // that the queries of a kv head are cut into, by query heads: `groups` are those of one tile
    float scale, softcap;
    Meta layout;
    const char *query;
    const char *planes[6];  // data and scales of keys, of values, and of rotary keys, which there are beside latents only
    const int64_t *bounds;
    const uint8_t *mask;
    const float *sink_logits;
    Mean mean;
    char *out;
    float *lse;

    int64_t rows() const { return groups * queries; }
    int64_t query_heads() const { return heads * tiles * groups; }
    bool is_latent() const { return rotary_width > 0; }
    // The codec of what is summed; beside latents, what is given as values are rotary keys.
    int64_t summed_codec() const { return is_latent() ? key_codec : value_codec; }
    int64_t padded(int64_t width) const { return (width + LANES - 1) / LANES * LANES; }
};

// What a stretch of tokens comes to, for all queries of a kv head.
struct Part {
    std::vector<float> out, largest, sum;
};

}  // namespace hfkv
