// Scores and sums of values of a tile of tokens, by products of their codes and digits.

#pragma once

#include <vector>

#include "call.h"
#include "integers.h"

#if HFKV_HAS_INTEGERS

namespace hfkv {

// Of all queries of one row and kv head. Weights have two digits where the result is rounded to less.
template <int64_t CODEC> class Products {
  public:
    Products(const Call &call, int64_t rows)
        : rows(rows), value_width(call.value_width), weight_digits(call.dtype == F32 ? 3 : 2),
          keys(call.key_width), values(call.value_width) {
        quads.assign(rows * (keys.padded() + MOST_TILE), 0), digits.resize(2 * rows), few.resize(rows);
        for (int64_t r = 0; r < rows; r++) {
            digits[r].quads = &quads[r * keys.padded()];
            digits[rows + r].quads = &quads[rows * keys.padded() + r * MOST_TILE];
        }
        codes.resize(rows ? std::max(keys.padded(), values.padded()) * MOST_TILE / BLOCK : 0);
        of_scores.assign(rows * MOST_TILE, 0.0f), of_values.assign(rows * values.padded(), 0.0f);
        placed.assign(keys.padded(), 0.0f);
    }

    // Takes a query `[width]`; whether its digits are as good as its numbers. Those of half precision are of few bits until
    // int4 rotates them, which leaves none far beyond the others: two digits are more exact than they are.
    bool take(int64_t r, const float *query, int64_t width) {
        for (int64_t i = 0; i < width; i++) placed[keys.place(i)] = query[i];
        float largest = magnitude_of(placed.data(), keys.padded());
        if (weight_digits == 3) {
            split<3, false>(placed.data(), keys.padded(), largest, keys.CENTRE, digits[r]);
        } else if (CODEC == INT8) {
            split<3, true>(placed.data(), keys.padded(), largest, keys.CENTRE, digits[r]);
        } else {
            split<2, false>(placed.data(), keys.padded(), largest, keys.CENTRE, digits[r]);
        }
        for (int64_t i = 0; i < keys.padded() / QUAD; i++) {
            if (digits[r].quads[i * QUAD + 2]) few[r].push_back(int32_t(i));
        }
        has_few = has_few && int64_t(few[r].size()) * FEW <= keys.padded() / QUAD;
        return CODEC == INT8 || weight_digits == 3 ? keeps<3>(placed.data(), keys.padded(), largest, digits[r])
                                                   : keeps<2>(placed.data(), keys.padded(), largest, digits[r]);
    }

    // The sum of a query's numbers as they are multiplied.
    float sum(int64_t r) const {
        const int32_t *of = digits[r].begins;
        return -digits[r].step / keys.CENTRE * (float(of[0]) + float(of[1]) * 0x1p-8f + float(of[2]) * 0x1p-16f);
    }

    // Scores of all queries against `count` keys, without their scales.
    void score(const char *data, int64_t count, const char *ahead) {
        read_across<CODEC>(keys, data, count, VECTORS, lines());
        CodeQuads of{lines(), VECTORS, keys.PARTS, keys.blocks * LANES, (keys.bytes + QUAD - 1) / QUAD};
        for (int64_t v = 0; v * LANES < count; v += 2, of.at += 2) {
            float *out = &of_scores[v * LANES];
            ahead = multiply_all(has_few ? 2 : 3, digits.data(), of, ahead, nullptr, out, MOST_TILE);
        }
    }

    // Those of one query, times `scale`, as long as the keys are the last that were read.
    inline void scores(int64_t r, float scale, Vector *out) {
        for (int64_t v = 0; v < VECTORS; v++) out[v] = load<Vector>(&of_scores[r * MOST_TILE + v * LANES]);
        if (has_few && !few[r].empty()) multiply_few<VECTORS>(digits[r], lines(), few[r].data(), int64_t(few[r].size()), out);
        for (int64_t v = 0; v < VECTORS; v++) out[v] *= digits[r].step * scale;
    }

    // Takes the weights `[rows, 64]`, times the scales of the values, of which the largest of each row is known.
    void weigh(const float *weights, const float *largest) {
        for (int64_t r = 0; r < rows; r++, weights += MOST_TILE) {
            if (weight_digits == 3) {
                split<3, false>(weights, MOST_TILE, largest[r], values.CENTRE, digits[rows + r]);
            } else {
                split<2, false>(weights, MOST_TILE, largest[r], values.CENTRE, digits[rows + r]);
            }
        }
    }

    // Adds `count` values, and what is added to all numbers of a query.
    void add(const char *data, int64_t count, const char *ahead, const float *offsets) {
        read_along<CODEC>(values, data, count, lines());
        int64_t vectors = values.padded() / LANES;
        CodeQuads of{lines(), vectors, 1, 0, (count + QUAD - 1) / QUAD};
        for (int64_t v = 0; v < vectors; v += 2, of.at += 2) {
            float *out = &of_values[v * LANES];
            ahead = multiply_all(weight_digits, &digits[rows], of, ahead, offsets, out, values.padded());
        }
    }

    // Makes what was added for a query smaller.
    void shrink(int64_t r, float by) {
        for (int64_t i = 0; i < values.padded(); i++) of_values[r * values.padded() + i] *= by;
    }

    // What was added for a query, to `out[width]`.
    void finish(int64_t r, float *out) { put_in_order<CODEC>(values, &of_values[r * values.padded()], value_width, out); }

  private:
    // One quad in so many has lowest digits, at most, where they are multiplied apart.
    static constexpr int64_t VECTORS = MOST_TILE / LANES, FEW = 4, LINES = CODEC == INT4 ? 1 : 2;

    struct alignas(BLOCK) Line {
        char bytes[BLOCK];
    };

    __m512i *lines() { return reinterpret_cast<__m512i *>(codes.data()); }

    // Returns what is ahead then.
    const char *multiply_all(int64_t count, const Digits *of, const CodeQuads &codes, const char *ahead,
                             const float *offsets, float *out, int64_t row_out) {
        for (int64_t r = 0; r < rows;) {
            int64_t block = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
            auto kernel = block == 4 ? choose<4>(count, !r) : block == 2 ? choose<2>(count, !r) : choose<1>(count, !r);
            kernel(of + r, codes, ahead, offsets ? offsets + r : nullptr, out + r * row_out, row_out);
            r += block;
        }
        return ahead + LINES * BLOCK * codes.parts * codes.quads;
    }

    template <int64_t ROWS> static auto choose(int64_t count, bool fetches) {
        if (!fetches) return count == 3 ? multiply<ROWS, 3, 0> : multiply<ROWS, 2, 0>;
        return count == 3 ? multiply<ROWS, 3, LINES> : multiply<ROWS, 2, LINES>;
    }

    int64_t rows, value_width, weight_digits;
    bool has_few = true;
    Coded<CODEC> keys, values;
    std::vector<int32_t> quads;
    std::vector<std::vector<int32_t>> few;
    std::vector<Digits> digits;
    std::vector<Line> codes;
    std::vector<float> of_scores, of_values, placed;
};

}  // namespace hfkv

#endif
