// What scores lack of keys that were written less their mean.
// Of each pair of numbers that the rotation by position turns, by an angle w a position, a query and the mean give c and s,
// by which a score at position p is c cos(p w) + s sin(p w) too low. 64 positions are looked at together, as x = -31.5 ..
// 31.5 from their middle, which (c, s) are turned to. What meets them there, cosines of x w and sines, is even and odd in x:
// one half is enough. Pairs that turn slowly meet 16 nodes only, 8 on each side, and the sums of all of them are
// interpolated from there, as exactly as float32 has them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "call.h"
#include "floats.h"
#include "vectors.h"

namespace hfkv {

// Half of the positions, and of the nodes.
constexpr int64_t HALF = MOST_TILE / 2, NODES = LANES / 2;
// Rows, of all queries at 64 positions each, that are found together: the tables stay in the first-level cache meanwhile, and
// fewer than 4 queries make rows for 4 at a time. One core of an EPYC, int4, attention with a mean against without: 4 queries
// of 128 1.23 x in ones, 1.20 in 32 rows; 3 of 64 1.20 and 1.12.
constexpr int64_t TOGETHER = 32;

class MeanScores {
  public:
    MeanScores(const Call &call, int64_t b, int64_t h)
        : mean(call.mean), b(b), rows(call.rows()), pairs(mean.pairs()), slow(mean.slow()), width(2 * (pairs + NODES)),
          most(std::max<int64_t>(TOGETHER / rows, 1)) {
        columns = mean.tables, nodes = columns + (pairs - slow + NODES) * MOST_TILE;
        steps = nodes + slow * LANES, turns = steps + MOST_TILE * 2 * pairs;
        numbers.resize((rows * (4 * pairs + most * MOST_TILE) + MOST_ROWS * width + MOST_TILE) / LANES);
        of_query = reinterpret_cast<float *>(numbers.data()), of_step = of_query + rows * 2 * pairs;
        met = of_step + rows * 2 * pairs, found = met + MOST_ROWS * width;
        rest.assign(most * rows, 0.0f);
        std::vector<float> query(call.key_width);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = b * call.query_strides[0] + (h * call.groups + r / call.queries) * call.query_strides[1];
            load_numbers(call.query, call.dtype, at + r % call.queries * call.query_strides[2], call.key_width, query.data());
            take(r, query, mean.vector + h * call.key_width, call.scale);
        }
    }

    // Adds what is lacking to the scores `[rows, VECTORS]` of a tile of tokens from index `from` on, which stand side by
    // side; so do those behind them up to index `end`, or to the end of the slots.
    template <int64_t VECTORS> void add(int64_t from, int64_t count, int64_t end, Vector *scores) {
        int64_t position = mean.position(b, from), at = position - begin, in_tile = at % MOST_TILE;
        if (at < 0 || in_tile + count > MOST_TILE || at + count > num_found * MOST_TILE) {
            if (from < mean.num_slots()) end = std::min(end, mean.num_slots());
            find(position, std::min((end - from + MOST_TILE - 1) / MOST_TILE, most));
            at = in_tile = 0;
        }
        const float *own = found + at / MOST_TILE * rows * MOST_TILE + in_tile;
        for (int64_t r = 0; r < rows; r++, own += MOST_TILE) {
            for (int64_t v = 0; v < VECTORS; v++) scores[r * VECTORS + v] += load<Vector>(own + v * LANES);
        }
    }

  private:
    // Takes a query, times a factor, and the mean.
    void take(int64_t r, std::vector<float> &query, const float *vector, float scale) {
        float *c = of_query + r * 2 * pairs, *s = c + pairs;
        int64_t fillers = mean.fillers();
        for (int64_t i = fillers; i < pairs; i++) {
            int64_t one = mean.first(i), other = mean.second(i);
            c[i] = (query[one] * vector[one] + query[other] * vector[other]) * scale;
            s[i] = (query[other] * vector[one] - query[one] * vector[other]) * scale;
        }
        int64_t width = int64_t(query.size());
        if (2 * (pairs - fillers) == width) return;
        for (int64_t i = fillers; i < pairs; i++) query[mean.first(i)] = query[mean.second(i)] = 0;
        double sum = 0;
        for (int64_t i = 0; i < width; i++) sum += double(query[i]) * vector[i];
        for (int64_t tile = 0; tile < most; tile++) rest[tile * rows + r] = float(sum * scale);
    }

    // Finds what is lacking at so many times 64 positions.
    void find(int64_t position, int64_t count) {
        begin = position, num_found = count;
        int64_t step = position & 63, size = 2 * pairs, num_rows = count * rows;
        for (int64_t r = 0; r < rows && step != last_step; r++) {
            float *own = of_step + r * size;
            turn(of_query + r * size, steps + step * size, 1, [&](int64_t i, Vector c, Vector s) {
                store(own + i, c), store(own + pairs + i, s);
            });
        }
        last_step = step;
        int64_t of_turn = position >> 6, own = 0;
        for (int64_t r = 0, block; r < num_rows; r += block) {
            block = num_rows - r >= MOST_ROWS ? MOST_ROWS : 1;
            for (int64_t n = 0; n < block; n++) {
                float *out = met + n * width;
                turn(of_step + own * size, turns + std::abs(of_turn) * size, of_turn < 0 ? -1 : 1,
                     [&](int64_t i, Vector c, Vector s) { store_alternating(out + 2 * i, c, s); });
                if (++own == rows) own = 0, of_turn++;
            }
            block == MOST_ROWS ? meet<MOST_ROWS>(r) : meet<1>(r);
        }
    }

    // Turns `(c, s)`, c of all pairs before s, by angles, of which the cosines lie before the sines.
    template <typename Put> inline void turn(const float *from, const float *by, float sign, Put put) const {
        for (int64_t i = 0, count = pairs; i < count; i += LANES) {
            Vector c = load<Vector>(from + i), s = load<Vector>(from + count + i);
            Vector cosine = load<Vector>(by + i), sine = load<Vector>(by + count + i) * sign;
            put(i, c * cosine + s * sine, s * cosine - c * sine);
        }
    }

    template <int64_t ROWS> inline void meet(int64_t r) {
        float *row = met;
        for (int64_t at = 0; at < LANES; at += NATIVE) {
            // Two sums each, of an even number of pairs: a sum waits for the one before.
            Native sums[ROWS][2] = {};
            for (int64_t i = 0; i < slow; i += 2) {
                Native node = load<Native>(nodes + i * LANES + at), next = load<Native>(nodes + (i + 1) * LANES + at);
                keep(node), keep(next);
#pragma GCC unroll 4
                for (int64_t n = 0; n < ROWS; n++) {
                    sums[n][0] += alternate(row + n * width + 2 * i) * node;
                    sums[n][1] += alternate(row + n * width + 2 * i + 2) * next;
                }
            }
            for (int64_t n = 0; n < ROWS; n++) store(row + n * width + 2 * pairs + at, sums[n][0] + sums[n][1]);
        }
        constexpr int64_t VECTORS = NATIVE == LANES ? 2 : 1;
        for (int64_t at = 0; at < HALF; at += VECTORS * NATIVE) {
            Native even[ROWS][VECTORS], odd[ROWS][VECTORS] = {};
            for (int64_t n = 0; n < ROWS; n++) {
                for (int64_t v = 0; v < VECTORS; v++) even[n][v] = Native{} + rest[r + n];
            }
            const float *column = columns + at;
            for (int64_t i = slow; i < pairs + NODES; i++, column += MOST_TILE) {
#pragma GCC unroll 2
                for (int64_t v = 0; v < VECTORS; v++) {
                    Native cosine = load<Native>(column + v * NATIVE), sine = load<Native>(column + HALF + v * NATIVE);
                    keep(cosine), keep(sine);
#pragma GCC unroll 4
                    for (int64_t n = 0; n < ROWS; n++) {
                        even[n][v] += row[n * width + 2 * i] * cosine;
                        odd[n][v] += row[n * width + 2 * i + 1] * sine;
                    }
                }
            }
            for (int64_t n = 0; n < ROWS; n++) {
                float *middle = found + (r + n) * MOST_TILE + HALF;
                for (int64_t v = 0; v < VECTORS; v++) {
                    int64_t first = at + v * NATIVE;
                    store(middle + first, even[n][v] + odd[n][v]);
                    store(middle - first - NATIVE, reversed(even[n][v] - odd[n][v]));
                }
            }
        }
    }

    const Mean &mean;
    int64_t b, rows, pairs, slow, width, most;
    int64_t begin = 0, num_found = 0, last_step = -1;
    const float *columns, *nodes, *steps, *turns;
    std::vector<float> rest;  // of what no rotation turns, of each row at as many times 64 positions as there may be
    // In one piece: c of all pairs, then s, of each query, and the same turned by less than 64 positions; c and s in turn of
    // each pair at the middle of 64 positions, and of the nodes, of a few rows; what is lacking at as many times 64
    // positions, of each query, from `begin` on, and room to read a tile from any position.
    std::vector<Vector> numbers;
    float *of_query, *of_step, *met, *found;
};

}  // namespace hfkv
