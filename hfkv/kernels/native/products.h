// Scores and sums of values of a tile of tokens, by products of their codes and digits.

#pragma once

#include <vector>

#include "call.h"
#include "integers.h"

#if HFKV_HAS_INTEGERS

namespace hfkv {

// Of all queries of one row and kv head.
template <int64_t CODEC> class Products {
  public:
    explicit Products(const Call &call)
        : rows(call.rows()), value_width(call.value_width), keys(call.key_width), values(call.value_width) {
        quads.assign(rows * (keys.padded() + MOST_TILE), 0), digits.resize(2 * rows);
        for (int64_t r = 0; r < rows; r++) {
            digits[r].quads = &quads[r * keys.padded()];
            digits[rows + r].quads = &quads[rows * keys.padded() + r * MOST_TILE];
        }
        codes.resize(std::max(keys.padded(), values.padded()) * MOST_TILE / BLOCK);
        sums.assign(rows * std::max(MOST_TILE, values.padded()), 0.0f);
        placed.assign(keys.padded(), 0.0f);
    }

    // Takes a query `[width]`; whether all of its numbers are finite.
    bool take(int64_t r, const float *query, int64_t width) {
        for (int64_t i = 0; i < width; i++) placed[keys.place(i)] = query[i];
        split(placed.data(), keys.padded(), keys.CENTRE, digits[r]);
        return digits[r].step == digits[r].step;
    }

    // Scores of all queries against `count` keys, without their scales and in units of `unit`.
    void score(const char *data, int64_t count, const char *ahead) {
        constexpr int64_t vectors = MOST_TILE / LANES;
        read_across<CODEC>(keys, data, count, vectors, lines());
        for (int64_t v = 0; v * LANES < count; v += 2) {
            multiply_all(0, v, vectors, keys.PARTS, keys.blocks * LANES, (keys.bytes + QUAD - 1) / QUAD, MOST_TILE, ahead + v * 2048, 128);
        }
    }

    float unit(int64_t r) const { return digits[r].step; }
    Vector scores(int64_t r, int64_t v) const { return load<Vector>(&sums[r * MOST_TILE + v * LANES]); }

    // Takes the weights `[64]` of a query, times the scales of the values.
    void weigh(int64_t r, const float *weights) { split(weights, MOST_TILE, values.CENTRE, digits[rows + r]); }

    // Adds `count` values, and what is added to all numbers of a query, to `out[rows, width]`.
    void add(const char *data, int64_t count, const char *ahead, const float *offsets, float *out, int64_t row_out) {
        read_along<CODEC>(values, data, count, lines());
        int64_t vectors = values.padded() / LANES;
        for (int64_t v = 0; v < vectors; v += 2) {
            multiply_all(rows, v, vectors, 1, 0, (count + QUAD - 1) / QUAD, values.padded(), ahead + v * 1024, 128);
        }
        for (int64_t r = 0; r < rows; r++) {
            const float *of = &sums[r * values.padded()];
            add_sums<CODEC>(values, of, digits[rows + r].step, offsets[r], value_width, out + r * row_out);
        }
    }

  private:
    struct alignas(BLOCK) Line {
        char bytes[BLOCK];
    };

    __m512i *lines() { return reinterpret_cast<__m512i *>(codes.data()); }

    void multiply_all(int64_t first, int64_t v, int64_t vectors, int64_t parts, int64_t apart, int64_t quads, int64_t row_out, const char *ahead, int64_t step) {
        const Digits *of = &digits[first];
        const __m512i *from = lines() + v;
        float *to = &sums[v * LANES];
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) multiply<4>(of + r, from, vectors, parts, apart, quads, to + r * row_out, row_out, ahead, step);
        for (; r + 2 <= rows; r += 2) multiply<2>(of + r, from, vectors, parts, apart, quads, to + r * row_out, row_out, ahead, step);
        if (r < rows) multiply<1>(of + r, from, vectors, parts, apart, quads, to + r * row_out, row_out, ahead, step);
    }

    int64_t rows, value_width;
    Coded<CODEC> keys, values;
    std::vector<int32_t> quads;
    std::vector<Digits> digits;
    std::vector<Line> codes;
    std::vector<float> sums, placed;
};

}  // namespace hfkv

#endif
