// Products of float32 rows.

#pragma once

#include "call.h"
#include "vectors.h"

namespace hfkv {

// Rows that are scored, or that values are added to, at once, and vectors of dims: as there are registers for.
constexpr int64_t MOST_ROWS = 4, WIDE = 2;

// Stored numbers that are read next, so many bytes each; none where those are 0. They are fetched by and by: processors
// do not foresee them where there is so much to compute.
struct Ahead {
    inline void fetch(int64_t numbers) {
        int64_t step = numbers * bytes;
        __builtin_prefetch(at);
        if (step > 64) __builtin_prefetch(at + 64);
        if (step > 128) __builtin_prefetch(at + 128), __builtin_prefetch(at + 192);
        at += step;
    }

    const char *at;
    int64_t bytes;
};

// Products of `ROWS` queries and 16 keys, both `[.., width]`.
template <int64_t ROWS>
inline void multiply_rows(const float *query, const float *keys, int64_t width, Ahead ahead, Vector *out) {
    constexpr int64_t TOKENS = NATIVE == LANES ? (ROWS == 1 ? 16 : 4) : ROWS == 1 ? 8 : 2;
    Native products[ROWS][TILE];
    for (int64_t t = 0; t < TILE; t += TOKENS) {
        Native sum[ROWS][TOKENS] = {};
        for (int64_t at = 0; at < width; at += NATIVE) {
            ahead.fetch(TOKENS * NATIVE);
            Native key[TOKENS];
#pragma GCC unroll 16
            for (int64_t i = 0; i < TOKENS; i++) key[i] = load<Native>(keys + (t + i) * width + at);
#pragma GCC unroll 4
            for (int64_t n = 0; n < ROWS; n++) {
                Native of_query = load<Native>(query + n * width + at);
#pragma GCC unroll 16
                for (int64_t i = 0; i < TOKENS; i++) sum[n][i] += of_query * key[i];
            }
        }
#pragma GCC unroll 4
        for (int64_t n = 0; n < ROWS; n++) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < TOKENS; i++) products[n][t + i] = sum[n][i];
        }
    }
    for (int64_t n = 0; n < ROWS; n++) out[n] = sums_of(products[n]);
}

// Adds an offset and 16 values `[16, width]` times weights `[ROWS, 16]` to some dims of `out`.
template <int64_t ROWS, int64_t VECTORS>
inline void add_dims(const float *weights, const float *offsets, const float *values, int64_t width, Ahead &ahead,
                     float *out) {
    Native sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int64_t n = 0; n < ROWS; n++) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; v++) sum[n][v] = load<Native>(out + n * width + v * NATIVE) + offsets[n];
    }
#pragma GCC unroll 16
    for (int64_t t = 0; t < TILE; t++) {
        ahead.fetch(VECTORS * NATIVE);
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; v++) {
            Native value = load<Native>(values + t * width + v * NATIVE);
#pragma GCC unroll 4
            for (int64_t n = 0; n < ROWS; n++) sum[n][v] += weights[n * TILE + t] * value;
        }
    }
#pragma GCC unroll 4
    for (int64_t n = 0; n < ROWS; n++) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < VECTORS; v++) store(out + n * width + v * NATIVE, sum[n][v]);
    }
}

// The same for all dims `[ROWS, width]`.
template <int64_t ROWS>
inline void add_rows(const float *weights, const float *offsets, const float *values, int64_t width, Ahead ahead,
                     float *out) {
    int64_t at = 0;
    for (; at + WIDE * NATIVE <= width; at += WIDE * NATIVE) {
        add_dims<ROWS, WIDE>(weights, offsets, values + at, width, ahead, out + at);
    }
    for (; at < width; at += NATIVE) add_dims<ROWS, 1>(weights, offsets, values + at, width, ahead, out + at);
}

}  // namespace hfkv
