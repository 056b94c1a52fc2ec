// The trellis of int2, as `hfkv.codecs.trellis` has it: in whole numbers all of it.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace hfkv {

constexpr double TRELLIS_DEVIATION = 44.0;
constexpr int PAIRS = 4, WINDOWS = 1 << 2 * PAIRS, STATES = WINDOWS / 4, STATE_VECTORS = STATES / int(LANES);

// The numbers of windows, the newest pair lowest, of the first half of all: the others are these turned round.
constexpr int8_t HALF_OF_WINDOWS[WINDOWS / 2] = {
    -11, -87, 1, 57, 93, -5, 33, -73, -68, 26, -21, 80, -50, 6, -26, 33,
    22, 65, -17, -57, 34, -5, -30, 30, 74, -50, 24, -11, -11, -44, 63, 21,
    -66, 12, 45, -27, -67, 37, 10, -24, -8, 70, -46, 16, 3, -73, 35, -30,
    3, -14, -68, 101, 41, -17, 15, -39, 47, -126, 5, -34, 24, -21, -41, 49,
    20, 57, -79, -8, 98, -32, 10, -110, -14, 12, 50, -53, 27, -19, -115, 36,
    -49, -8, 4, 40, 16, -54, 35, -13, -42, 83, -8, 18, -20, -88, 43, 11,
    -89, 6, -34, 45, -37, 73, -21, 7, 20, -76, -23, 65, 26, -41, 58, -4,
    59, -47, -19, 12, -48, -10, 46, 14, -57, -8, 54, 17, 13, 42, -8, -47,
};

// By the path that comes to a state, and states.
using PathCosts = Integers[4][STATE_VECTORS];

// What windows stand for and cost; see `_costs`.
struct Trellis {
    Trellis() {
        for (int window = 0; window < WINDOWS; window++) {
            int number = window < WINDOWS / 2 ? HALF_OF_WINDOWS[window] : -HALF_OF_WINDOWS[WINDOWS - 1 - window];
            int stored = 0;
            for (int pair = 0; pair < PAIRS; pair++) stored |= (window >> 2 * pair & 3) << 2 * (PAIRS - 1 - pair);
            numbers[window] = stored_numbers[stored] = int8_t(number);
            int path = window / STATES, state = window % STATES;
            squares[path][state / LANES][state % LANES] = 4 * number * number + path;
            products[path][state / LANES][state % LANES] = -4 * number;
            paths[path][state / LANES][state % LANES] = path;
        }
    }

    int8_t numbers[WINDOWS];
    alignas(64) int8_t stored_numbers[WINDOWS];  // by windows whose newest pair is the highest, as in a string
    PathCosts squares, products, paths;
};
inline const Trellis trellis;

inline int64_t bytes_of_string(int64_t width) { return (width + 3) / 4 + 1; }

// Lanes FIRST .. FIRST + 3, four times each.
template <int FIRST> inline Integers spread(Integers x) {
#if defined(__clang__)
    return __builtin_shufflevector(x, x, FIRST, FIRST, FIRST, FIRST, FIRST + 1, FIRST + 1, FIRST + 1, FIRST + 1, FIRST + 2,
                                   FIRST + 2, FIRST + 2, FIRST + 2, FIRST + 3, FIRST + 3, FIRST + 3, FIRST + 3);
#else
    return __builtin_shuffle(x, Integers{FIRST, FIRST, FIRST, FIRST, FIRST + 1, FIRST + 1, FIRST + 1, FIRST + 1, FIRST + 2,
                                         FIRST + 2, FIRST + 2, FIRST + 2, FIRST + 3, FIRST + 3, FIRST + 3, FIRST + 3});
#endif
}

inline Integers smaller(Integers a, Integers b) {
#if defined(__AVX512F__)
    return (Integers)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
    Integers is_less = a < b;
    return (a & is_less) | (b & ~is_less);
#endif
}

// What a state's cheapest path costs, plus the number of the path, where it comes by `PATH`.
template <int PATH, int VECTOR>
inline Integers cost_by(const Integers *cost, const PathCosts &squares, int32_t number) {
    constexpr int FROM = PATH * STATES / 4 + 4 * VECTOR;
    Integers of_window = squares[PATH][VECTOR] + number * trellis.products[PATH][VECTOR];
    return spread<FROM % int(LANES)>(cost[FROM / int(LANES)]) + of_window;
}

// The next number of all paths; writes which of them come to each state.
template <int VECTOR = 0>
inline void step(const Integers *cost, const PathCosts &squares, int32_t number, Integers *next, uint8_t *paths) {
    Integers best = smaller(
        smaller(cost_by<0, VECTOR>(cost, squares, number), cost_by<1, VECTOR>(cost, squares, number)),
        smaller(cost_by<2, VECTOR>(cost, squares, number), cost_by<3, VECTOR>(cost, squares, number)));
    Codes path = __builtin_convertvector(best & 3, Codes);
    std::memcpy(paths + VECTOR * LANES, &path, LANES);
    next[VECTOR] = best & ~3;
    if constexpr (VECTOR + 1 < STATE_VECTORS) step<VECTOR + 1>(cost, squares, number, next, paths);
}

// Sums over the numbers of a string: of their products with what was to be written, and of their squares.
struct StringSums {
    int64_t products, squares;
};

// Finds and writes the string of the least squared error for doubled numbers; see `hfkv.codecs.trellis.encode`.
inline StringSums write_string(const int32_t *doubled, int64_t width, uint8_t *out, std::vector<uint8_t> &paths) {
    int64_t bytes = bytes_of_string(width) - 1;
    paths.resize(4 * bytes * STATES);
    Integers cost[2][STATE_VECTORS] = {};
    uint8_t *at = paths.data();
    for (int64_t byte = 0; byte < bytes; byte++) {
        for (int pair = 0; pair < 4; pair++, at += STATES) {
            int64_t i = pair * bytes + byte;
            bool is_there = i < width;  // behind the row all windows are as good
            step(cost[pair % 2], is_there ? trellis.squares : trellis.paths, is_there ? doubled[i] : 0, cost[1 - pair % 2], at);
        }
    }
    int state = 0;
    for (int other = 1; other < STATES; other++) {
        if (cost[0][other / LANES][other % LANES] < cost[0][state / LANES][state % LANES]) state = other;
    }
    StringSums sums = {};
    std::fill_n(out, 1 + bytes, uint8_t(0));
    for (int64_t byte = bytes - 1; byte >= 0; byte--) {
        for (int pair = 3; pair >= 0; pair--) {
            at -= STATES;
            int window = at[state] * STATES + state;
            int64_t i = pair * bytes + byte;
            out[1 + byte] |= uint8_t((window & 3) << 2 * pair);
            if (i < width) {
                int64_t number = trellis.numbers[window];
                sums.products += number * doubled[i], sums.squares += number * number;
            }
            state = window >> 2;
        }
    }
    for (int pair = 3; pair > 0; pair--, state >>= 2) out[0] |= uint8_t((state & 3) << 2 * pair);
    return sums;
}

// The numbers of a row, without their scale.
template <typename T> inline void read_string(const uint8_t *__restrict row, int64_t width, T *__restrict out) {
    int64_t bytes = bytes_of_string(width) - 1;
    for (int pair = 0; pair < 4; pair++) {
        int64_t begin = pair * bytes, count = std::min(bytes, width - begin);
        for (int64_t i = 0; i < count; i++) {
            int word = row[i] | row[i + 1] << 8;
            out[begin + i] = T(trellis.stored_numbers[word >> (10 - 2 * PAIRS + 2 * pair) & (WINDOWS - 1)]);
        }
    }
}

}  // namespace hfkv
