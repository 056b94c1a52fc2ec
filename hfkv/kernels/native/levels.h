// The eight levels of int3, as `hfkv.codecs.int3` has them.

#pragma once

#include <algorithm>
#include <vector>

#include "log_scale.h"
#include "vectors.h"

namespace hfkv {

constexpr int LEVELS[4] = {14, 43, 77, 123};
constexpr float LEVEL_BOUNDS[3] = {28.5f, 60.0f, 100.0f};
constexpr double LEVELS_DEVIATION = 57.2;

inline int64_t bytes_of_levels(int64_t width) { return (width + 7) / 8 * 3; }

// What is worked out of a row, which goes on up to a multiple of LANES.
struct LevelScratch {
    explicit LevelScratch(int64_t widest)
        : products(widest + 2 * LANES), squares(widest + 2 * LANES), levels(widest + 2 * LANES), best(widest + 2 * LANES) {}

    std::vector<float> products, squares;
    std::vector<uint8_t> levels, best;
};

// Finds the levels, 0 .. 3, of a row's magnitudes under a scale, and the scale that suits these best.
inline BestScale find_levels(const float *row, int64_t width, float sum, float scale, LevelScratch &of) {
    const Integers magnitude = Integers{} + 0x7FFFFFFF;
    for (int64_t i = 0; i < width; i += LANES) {
        Vector size = (Vector)((Integers)load<Vector>(row + i) & magnitude), number = all(LEVELS[0]);
        Integers level = {};
        for (int step = 0; step < 3; step++) {
            Integers is_above = size >= all(scale * LEVEL_BOUNDS[step]);
            number = select(is_above, all(LEVELS[step + 1]), number);
            level -= is_above;
        }
        Codes codes = __builtin_convertvector(level, Codes);
        std::memcpy(&of.levels[i], &codes, LANES);
        store(&of.products[i], size * number);
        store(&of.squares[i], number * number);
    }
    return best_scale(sum, row_sum(of.products.data(), width), row_sum(of.squares.data(), width));
}

// Writes a rotated row: two bits of each level, then signs. Returns the byte of its scale.
inline uint8_t write_levels(const float *row, int64_t width, uint8_t *out, LevelScratch &of) {
    int64_t eighth = (width + 7) / 8;
    float sum = squares_of(row, width, of.squares.data());
    uint8_t middle = scale_of_row(sum, width, LEVELS_DEVIATION);
    std::fill_n(out, 3 * eighth, uint8_t(0));
    if (!has_numbers(middle)) return middle;
    BestScale best = {0, INFINITY};
    for (int by : {0, -1, 1, -2, 2}) {
        BestScale found = find_levels(row, width, sum, from_log_scale(shifted(middle, by)), of);
        if (!(found.cost < best.cost)) continue;
        best = found;
        std::swap(of.levels, of.best);
    }
    auto fill = [&](std::vector<uint8_t> &codes) { std::fill(codes.begin() + width, codes.begin() + 8 * eighth, uint8_t(0)); };
    fill(of.best);
    for (int64_t part = 0; part < 4; part++) {
        for (int64_t i = 0; i < 2 * eighth; i++) out[i] |= uint8_t(of.best[2 * part * eighth + i] << 2 * part);
    }
    for (int64_t i = 0; i < width; i++) of.levels[i] = row[i] < 0;
    fill(of.levels);
    for (int64_t part = 0; part < 8; part++) {
        for (int64_t i = 0; i < eighth; i++) out[2 * eighth + i] |= uint8_t(of.levels[part * eighth + i] << part);
    }
    return best.byte;
}

// The numbers of a row, without their scale.
template <typename T> inline void read_levels(const uint8_t *__restrict row, int64_t width, T *__restrict out) {
    int64_t eighth = (width + 7) / 8;
    for (int64_t part = 0; part < 8; part++) {
        const uint8_t *pairs = row + part % 2 * eighth, *signs = row + 2 * eighth;
        int64_t begin = part * eighth, count = std::min(eighth, width - begin), shift = part / 2 * 2;
        for (int64_t i = 0; i < count; i++) {
            int level = pairs[i] >> shift & 3, high = level >> 1, sign = signs[i] >> part & 1;
            int number = 14 + 29 * level + 5 * high + 17 * (level & high);
            out[begin + i] = T((number ^ -sign) + sign);
        }
    }
}

}  // namespace hfkv
