// Scores and sums of values of a tile of tokens, by products of their codes and digits.

#pragma once

#include <vector>

#include "call.h"
#include "integers.h"

#if HFKV_HAS_INTEGERS

namespace hfkv {

// One quad in so many has lowest digits, at most, where they are multiplied apart.
constexpr int64_t FEW = 4;

// Digits of weights: two where the result is rounded to half precision.
inline int64_t weight_digits_of(const Call &call) { return call.dtype == F32 ? 3 : 2; }

template <int64_t ROWS, int64_t LINES> inline auto multiply_of(int64_t digits, bool fetches) {
    if (!fetches) return digits == 3 ? multiply<ROWS, 3, 0> : multiply<ROWS, 2, 0>;
    return digits == 3 ? multiply<ROWS, 3, LINES> : multiply<ROWS, 2, LINES>;
}

// Products of so many digits of all rows and codes; see `multiply`. Returns what is ahead then, where there is anything.
template <int64_t CODEC>
inline const char *multiply_all(int64_t count, const std::vector<Digits> &rows, const CodeQuads &codes, const char *ahead,
                                const float *offsets, float *out, int64_t row_out) {
    constexpr int64_t LINES = CODEC == INT4 ? 1 : 2;
    for (int64_t r = 0, end = int64_t(rows.size()); r < end;) {
        int64_t block = end - r >= 4 ? 4 : end - r >= 2 ? 2 : 1;
        bool fetches = ahead && !r;
        auto kernel = block == 4   ? multiply_of<4, LINES>(count, fetches)
                      : block == 2 ? multiply_of<2, LINES>(count, fetches)
                                   : multiply_of<1, LINES>(count, fetches);
        kernel(&rows[r], codes, ahead, offsets ? offsets + r : nullptr, out + r * row_out, row_out);
        r += block;
    }
    return ahead ? ahead + LINES * BLOCK * codes.parts * codes.quads : nullptr;
}

// Scores of all queries of a task against keys `[.., width]`.
template <int64_t CODEC, bool IS_ROTATED> class KeyProducts {
  public:
    // Of no queries where they have no digits.
    KeyProducts(const Call &call, int64_t rows, int64_t width)
        : width(width), weight_digits(weight_digits_of(call)), keys(width) {
        quads.assign(rows * keys.padded(), 0), digits.resize(rows), few.resize(rows);
        for (int64_t r = 0; r < rows; r++) digits[r].quads = &quads[r * keys.padded()];
        codes.resize(rows ? keys.padded() * MOST_TILE / BLOCK : 0);
        of_scores.assign(rows * MOST_TILE, 0.0f), placed.assign(keys.padded(), 0.0f);
    }

    // Takes a query `[width]`; whether its digits are as good as its numbers. Those of half precision are of few bits until
    // they are rotated, which leaves none far beyond the others: two digits are more exact than they are.
    bool take(int64_t r, const float *query) {
        for (int64_t i = 0; i < width; i++) placed[keys.place(i)] = query[i];
        float largest = magnitude_of(placed.data(), keys.padded());
        if (weight_digits == 3) {
            split<3, false>(placed.data(), keys.padded(), largest, keys.CENTRE, digits[r]);
        } else if (!IS_ROTATED) {
            split<3, true>(placed.data(), keys.padded(), largest, keys.CENTRE, digits[r]);
        } else {
            split<2, false>(placed.data(), keys.padded(), largest, keys.CENTRE, digits[r]);
        }
        for (int64_t i = 0; i < keys.padded() / QUAD; i++) {
            if (digits[r].quads[i * QUAD + 2]) few[r].push_back(int32_t(i));
        }
        has_few = has_few && int64_t(few[r].size()) * FEW <= keys.padded() / QUAD;
        return !IS_ROTATED || weight_digits == 3 ? keeps<3>(placed.data(), keys.padded(), largest, digits[r])
                                                   : keeps<2>(placed.data(), keys.padded(), largest, digits[r]);
    }

    // The sum of a query's numbers as they are multiplied.
    float sum(int64_t r) const {
        const int32_t *of = digits[r].begins;
        return -digits[r].step / keys.CENTRE * (float(of[0]) + float(of[1]) * 0x1p-8f + float(of[2]) * 0x1p-16f);
    }

    // Scores of all queries against `count` keys, without their scales.
    void score(const char *data, int64_t count, const char *ahead) {
        read_across<CODEC>(keys, data, count, VECTORS, lines_of(codes));
        CodeQuads of{lines_of(codes), VECTORS, keys.PARTS, keys.blocks * LANES, (keys.bytes + QUAD - 1) / QUAD};
        for (int64_t v = 0; v * LANES < count; v += 2, of.at += 2) {
            float *out = &of_scores[v * LANES];
            ahead = multiply_all<CODEC>(has_few ? 2 : 3, digits, of, ahead, nullptr, out, MOST_TILE);
        }
    }

    // Those of one query, times `scale`, as long as the keys are the last that were read.
    inline void scores(int64_t r, float scale, Vector *out) {
        for (int64_t v = 0; v < VECTORS; v++) out[v] = load<Vector>(&of_scores[r * MOST_TILE + v * LANES]);
        const std::vector<int32_t> &its = few[r];
        if (has_few && !its.empty()) multiply_few<VECTORS>(digits[r], lines_of(codes), its.data(), its.size(), out);
        for (int64_t v = 0; v < VECTORS; v++) out[v] *= digits[r].step * scale;
    }

  private:
    static constexpr int64_t VECTORS = MOST_TILE / LANES;

    int64_t width, weight_digits;
    bool has_few = true;
    Coded<CODEC> keys;
    std::vector<int32_t> quads;
    std::vector<std::vector<int32_t>> few;
    std::vector<Digits> digits;
    std::vector<Line> codes;
    std::vector<float> of_scores, placed;
};

// Sums of values, times the weights of all queries of a task.
template <int64_t CODEC> class ValueProducts {
  public:
    ValueProducts(const Call &call, int64_t rows)
        : width(call.value_width), weight_digits(weight_digits_of(call)), values(call.value_width) {
        quads.assign(rows * MOST_TILE, 0), digits.resize(rows);
        for (int64_t r = 0; r < rows; r++) digits[r].quads = &quads[r * MOST_TILE];
        codes.resize(rows ? values.padded() * MOST_TILE / BLOCK : 0);
        sums.assign(rows * values.padded(), 0.0f);
    }

    // Takes the weights `[rows, 64]`, times the scales of the values, of which the largest of each row is known.
    void weigh(const float *weights, const float *largest) {
        for (int64_t r = 0; r < int64_t(digits.size()); r++, weights += MOST_TILE) {
            if (weight_digits == 3) {
                split<3, false>(weights, MOST_TILE, largest[r], values.CENTRE, digits[r]);
            } else {
                split<2, false>(weights, MOST_TILE, largest[r], values.CENTRE, digits[r]);
            }
        }
    }

    // Adds `count` values, and what is added to all numbers of a query.
    void add(const char *data, int64_t count, const char *ahead, const float *offsets, const bool *) {
        read_along<CODEC>(values, data, count, lines_of(codes));
        int64_t vectors = values.padded() / LANES;
        CodeQuads of{lines_of(codes), vectors, 1, 0, (count + QUAD - 1) / QUAD};
        for (int64_t v = 0; v < vectors; v += 2, of.at += 2) {
            float *out = &sums[v * LANES];
            ahead = multiply_all<CODEC>(weight_digits, digits, of, ahead, offsets, out, values.padded());
        }
    }

    // Makes what was added for a query smaller.
    void shrink(int64_t r, float by) {
        for (int64_t i = 0; i < values.padded(); i++) sums[r * values.padded() + i] *= by;
    }

    // What was added for a query, to `out[width]`.
    void finish(int64_t r, float *out) { put_in_order<CODEC>(values, &sums[r * values.padded()], width, out); }

  private:
    int64_t width, weight_digits;
    Coded<CODEC> values;
    std::vector<int32_t> quads;
    std::vector<Digits> digits;
    std::vector<Line> codes;
    std::vector<float> sums;
};

}  // namespace hfkv

#endif
