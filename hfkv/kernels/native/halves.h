// Products of bfloat16 numbers with sums in float32, where processors multiply such two to a lane.
// bfloat16 tokens are multiplied as they lie; fp8 codes, which bfloat16 holds, by way of a table. Queries are bfloat16 as
// they come; a weight is rounded to it, or the sum of two. A lane is a token where scores are summed, and a dim where values
// are, as in integers.h.

#pragma once

#include <algorithm>
#include <vector>

#include "call.h"
#include "integers.h"

#if HFKV_HAS_INTEGERS && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HFKV_HAS_HALVES 1

namespace hfkv {

// The codes of fp8 as bfloat16, without their signs: the lower bytes of 128 numbers, then the upper ones.
struct HalfTable {
    HalfTable() {
        for (int code = 0; code < 128; code++) {
            float number = code < 8 ? float(code) * 0x1p-9f : from_bits((uint32_t(code) << 20) + (120u << 23));
            uint16_t half = to_bf16(number);
            bytes[code] = uint8_t(half), bytes[128 + code] = uint8_t(half >> 8);
        }
    }

    alignas(64) uint8_t bytes[256];
};
inline const HalfTable half_table;

// How the numbers of one row are read: 64 at a time, as two vectors of bfloat16.
template <int64_t CODEC> struct HalfRow {
    static constexpr int64_t BLOCK = 64;

    explicit HalfRow(int64_t width)
        : bytes(CODEC == NONE_BF16 ? 2 * width : width), blocks((width + BLOCK - 1) / BLOCK),
          of_last(~uint64_t(0) >> (blocks * BLOCK - width)) {}

    int64_t padded() const { return blocks * BLOCK; }
    // Where a number is among those that are read, and where its sum is among those of pairs of tokens.
    static int64_t place(int64_t i) {
        return CODEC == FP8 ? i / BLOCK * BLOCK + i % 16 / 8 * 32 + i % BLOCK / 16 * 8 + i % 8 : i;
    }
    static int64_t place_of_sum(int64_t i) {
        int64_t at = place(i), in_half = at % 32;
        return at - in_half + in_half % 8 / 4 * LANES + in_half / 8 * 4 + in_half % 4;
    }

    inline void read(const char *row, int64_t block, __m512i *out) const {
        uint64_t mask = block + 1 < blocks ? ~uint64_t(0) : of_last;
        if (CODEC == NONE_BF16) {
            out[0] = _mm512_maskz_loadu_epi16(__mmask32(mask), row + 2 * BLOCK * block);
            out[1] = _mm512_maskz_loadu_epi16(__mmask32(mask >> 32), row + 2 * BLOCK * block + BLOCK);
            return;
        }
        const __m512i *table = reinterpret_cast<const __m512i *>(half_table.bytes);
        __m512i codes = _mm512_maskz_loadu_epi8(mask, row + BLOCK * block);
        __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
        __m512i high = _mm512_permutex2var_epi8(table[2], codes, table[3]);
        high = _mm512_or_si512(high, _mm512_and_si512(codes, _mm512_set1_epi8(int8_t(0x80))));
        out[0] = _mm512_unpacklo_epi8(low, high), out[1] = _mm512_unpackhi_epi8(low, high);
    }

    int64_t bytes, blocks;
    uint64_t of_last;
};

// Adds the products of pairs. Of the compiler's own function g++ 12 moves every sum to and fro.
inline void add_pairs(__m512 &sum, __m512i one, __m512i other) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(one), "v"(other));
}

// Adds the sums of the products of `ROWS` rows of pairs `[PARTS, count]`, `row_pairs` apart, and four vectors of pairs of
// each, `vectors` apart, to `out[row * row_out + 0 .. 63]`. Meanwhile as many lines a pair are fetched from what is read next.
template <int64_t ROWS, int64_t PARTS, int64_t LINES>
[[gnu::noinline]] void multiply_pairs(const int32_t *rows, int64_t row_pairs, const __m512i *pairs, int64_t vectors,
                                      int64_t count, const char *ahead, float *out, int64_t row_out) {
    __m512 sums[ROWS][4];
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < 4; v++) sums[r][v] = load<__m512>(out + r * row_out + v * LANES);
    }
    for (int64_t i = 0; i < count; i++, pairs += vectors) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < LINES; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
        __m512i of[4];
#pragma GCC unroll 4
        for (int64_t v = 0; v < 4; v++) of[v] = pairs[v];
#pragma GCC unroll 4
        for (int64_t r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
            for (int64_t part = 0; part < PARTS; part++) {
                __m512i pair = _mm512_set1_epi32(rows[r * row_pairs + part * (row_pairs / PARTS) + i]);
#pragma GCC unroll 4
                for (int64_t v = 0; v < 4; v++) add_pairs(sums[r][v], pair, of[v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < 4; v++) store(out + r * row_out + v * LANES, sums[r][v]);
    }
}

// The same of all rows. Returns what is ahead then, where there is anything.
template <int64_t PARTS, int64_t LINES>
inline const char *multiply_all_pairs(int64_t count_rows, const int32_t *rows, int64_t row_pairs, const __m512i *pairs,
                                      int64_t vectors, int64_t count, const char *ahead, float *out, int64_t row_out) {
    for (int64_t r = 0; r < count_rows;) {
        int64_t left = count_rows - r, block = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        bool fetches = ahead && !r;
        auto kernel = block == 4   ? fetches ? multiply_pairs<4, PARTS, LINES> : multiply_pairs<4, PARTS, 0>
                      : block == 2 ? fetches ? multiply_pairs<2, PARTS, LINES> : multiply_pairs<2, PARTS, 0>
                      : fetches    ? multiply_pairs<1, PARTS, LINES>
                                   : multiply_pairs<1, PARTS, 0>;
        kernel(rows + r * row_pairs, row_pairs, pairs, vectors, count, ahead, out + r * row_out, row_out);
        r += block;
    }
    return ahead ? ahead + LINES * 64 * count : nullptr;
}

// Scores of all queries of a task against keys `[.., width]`; the same functions as those of `KeyProducts`.
template <int64_t CODEC> class HalfKeys {
  public:
    HalfKeys(const Call &call, int64_t rows, int64_t width)
        : rows(rows), width(width), is_half(call.dtype == BF16), keys(width) {
        queries.assign(rows * keys.padded(), 0), of_scores.assign(rows * MOST_TILE, 0.0f);
        pairs.resize(rows ? keys.padded() / 2 * VECTORS : 0);
    }

    // Takes a query `[width]`; whether bfloat16 holds it.
    bool take(int64_t r, const float *query) {
        for (int64_t i = 0; i < width; i++) queries[r * keys.padded() + keys.place(i)] = uint16_t(bits_of(query[i]) >> 16);
        return is_half;
    }

    float sum(int64_t) const { return 0; }

    void score(const char *data, int64_t count, const char *ahead) {
        __m512i *out = lines_of(pairs);
        for (int64_t v = 0; v * LANES < count; v++) {
            for (int64_t block = 0; block < keys.blocks; block++) {
                __m512i x[LANES][2], y[LANES];
                for (int64_t i = 0; i < LANES; i++) {
                    keys.read(data + std::min(v * LANES + i, count - 1) * keys.bytes, block, x[i]);
                }
                for (int64_t half = 0; half < 2; half++) {
                    for (int64_t i = 0; i < LANES; i++) y[i] = x[i][half];
                    transpose(y);
                    __m512i *to = out + (2 * block + half) * LANES * VECTORS + v;
                    for (int64_t i = 0; i < LANES; i++) to[i * VECTORS] = y[i];
                }
            }
        }
        std::fill(of_scores.begin(), of_scores.end(), 0.0f);
        int64_t count_pairs = keys.padded() / 2;
        multiply_all_pairs<1, LINES>(rows, reinterpret_cast<const int32_t *>(queries.data()), count_pairs, out, VECTORS,
                                     count_pairs, ahead, of_scores.data(), MOST_TILE);
    }

    inline void scores(int64_t r, float scale, Vector *out) const {
        for (int64_t v = 0; v < VECTORS; v++) out[v] = load<Vector>(&of_scores[r * MOST_TILE + v * LANES]) * scale;
    }

  private:
    static constexpr int64_t VECTORS = MOST_TILE / LANES, LINES = CODEC == FP8 ? 2 : 4;

    int64_t rows, width;
    bool is_half;
    HalfRow<CODEC> keys;
    std::vector<uint16_t> queries;
    std::vector<Line> pairs;
    std::vector<float> of_scores;
};

// Sums of values, times the weights of all queries of a task; the same functions as those of `ValueProducts`.
template <int64_t CODEC> class HalfValues {
  public:
    // A weight of latents is one number, as of torch's products; else it is two.
    HalfValues(const Call &call, int64_t rows)
        : rows(rows), width(call.value_width), parts(call.is_latent() ? 1 : 2), values(call.value_width) {
        weights.assign(rows * parts * MOST_TILE / 2, 0), sums.assign(rows * values.padded(), 0.0f);
        pairs.resize(rows ? values.padded() * MOST_TILE / 2 / LANES : 0);
    }

    // Takes the weights `[rows, 64]`, times the scales of the values.
    void weigh(const float *given, const float *) {
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t i = 0; i < MOST_TILE; i += 2 * LANES, given += 2 * LANES) {
                __m512 low = load<__m512>(given), high = load<__m512>(given + LANES);
                for (int64_t part = 0; part < parts; part++) {
                    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                    _mm512_storeu_si512(&weights[(r * parts + part) * MOST_TILE / 2 + i / 2], both);
                    low -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
                    high -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
                }
            }
        }
    }

    // Adds `count` values, but those that nobody sees.
    void add(const char *data, int64_t count, const char *ahead, const float *, const bool *is_seen) {
        __m512i *out = lines_of(pairs);
        int64_t vectors = values.blocks * 4, count_pairs = (count + 1) / 2;
        for (int64_t t = 0; t < count; t += 2) {
            bool has_first = is_seen[t], has_second = t + 1 < count && is_seen[t + 1];
            for (int64_t block = 0; block < values.blocks; block++, out += 4) {
                __m512i a[2] = {}, b[2] = {};
                if (has_first) values.read(data + t * values.bytes, block, a);
                if (has_second) values.read(data + (t + 1) * values.bytes, block, b);
                for (int64_t half = 0; half < 2; half++) {
                    out[2 * half] = _mm512_unpacklo_epi16(a[half], b[half]);
                    out[2 * half + 1] = _mm512_unpackhi_epi16(a[half], b[half]);
                }
            }
        }
        out = lines_of(pairs);
        for (int64_t block = 0; block < values.blocks; block++, out += 4) {
            float *to = &sums[block * values.BLOCK];
            ahead = parts == 1 ? multiply_all_pairs<1, LINES>(rows, weights.data(), MOST_TILE / 2, out, vectors, count_pairs,
                                                              ahead, to, values.padded())
                               : multiply_all_pairs<2, LINES>(rows, weights.data(), MOST_TILE, out, vectors, count_pairs,
                                                              ahead, to, values.padded());
        }
    }

    void shrink(int64_t r, float by) {
        for (int64_t i = 0; i < values.padded(); i++) sums[r * values.padded() + i] *= by;
    }

    void finish(int64_t r, float *out) {
        for (int64_t i = 0; i < width; i++) out[i] = sums[r * values.padded() + values.place_of_sum(i)];
    }

  private:
    static constexpr int64_t LINES = CODEC == FP8 ? 2 : 4;

    int64_t rows, width, parts;
    HalfRow<CODEC> values;
    std::vector<int32_t> weights;
    std::vector<Line> pairs;
    std::vector<float> sums;
};

}  // namespace hfkv
#else
#define HFKV_HAS_HALVES 0
#endif
