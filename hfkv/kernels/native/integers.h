// Products of codes and float32 numbers in exact integers, where processors multiply bytes four to a lane.
// A number becomes digits of base 256, -128 .. 127 each: as a multiple of the largest of its row / 2 ** 23 three, which is
// about as exact as float32, or of the largest / 2 ** 15 two. Codes are made unsigned, as the instruction wants one of its
// factors: int8's plus 128, int4's as they are stored; what they are too large by, times the sum of the digits, is what a
// sum begins with. A lane is a token where scores are summed, over the dims, and a dim where values are, over the tokens:
// so lanes are never summed.

#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HFKV_HAS_INTEGERS 1

namespace hfkv {

// Bytes of a vector, numbers of a lane.
constexpr int64_t BLOCK = 64, QUAD = 4;

// A vector of codes.
struct alignas(BLOCK) Line {
    char bytes[BLOCK];
};

inline __m512i *lines_of(std::vector<Line> &codes) { return reinterpret_cast<__m512i *>(codes.data()); }

// How the codes of one row lie: in `parts` nibbles or one byte, and what they are too large by.
template <int64_t CODEC> struct Coded {
    static constexpr int64_t PARTS = CODEC == INT4 ? 2 : 1, CENTRE = CODEC == INT4 ? 8 : 128;

    explicit Coded(int64_t width)
        : bytes((width + PARTS - 1) / PARTS), blocks((bytes + BLOCK - 1) / BLOCK),
          of_last(~uint64_t(0) >> (blocks * BLOCK - bytes)) {}

    // Numbers of a row, each part filled up to whole blocks, and where one of them is among those.
    int64_t padded() const { return PARTS * blocks * BLOCK; }
    int64_t place(int64_t i) const { return i < bytes ? i : i - bytes + blocks * BLOCK; }
    __mmask64 bytes_of(int64_t block) const { return block + 1 < blocks ? ~uint64_t(0) : of_last; }

    int64_t bytes, blocks;
    __mmask64 of_last;
};

// What a row of numbers is as integers.
struct Digits {
    int32_t *quads;     // [quads, 4]: the highest digits of four numbers, the middle ones, the lowest
    int32_t begins[4];  // what the sums of products with codes begin with
    float step;         // what the highest digit is worth; NaN where a number is not finite
};

// The largest magnitude of `count` numbers, a multiple of 16: one that is not finite where there are any.
inline float magnitude_of(const float *numbers, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        // As integers, magnitudes are in the same order, and those that are not finite the largest.
        most = _mm512_max_epi32(most, _mm512_and_si512(load<__m512i>(numbers + i), _mm512_set1_epi32(0x7FFFFFFF)));
    }
    return from_bits(uint32_t(_mm512_reduce_max_epi32(most)));
}

// Splits `count` numbers of which the largest is known into so many digits; if `BINARY`, what is of few bits is of few
// digits.
template <int64_t DIGITS, bool BINARY>
inline void split(const float *numbers, int64_t count, float largest, int32_t centre, Digits &digits) {
    // Of four numbers the bytes 2, then 1, then 0, then nothing.
    const __m512i order = _mm512_broadcast_i32x4(_mm_set_epi8(-1, -1, -1, -1, 12, 8, 4, 0, 13, 9, 5, 1, 14, 10, 6, 2));
    const __m512i ones = _mm512_set1_epi8(1), half = _mm512_set1_epi32(0x808080);
    // What the lowest digit is worth in the highest's, and the most that digits hold, less what products are rounded by.
    constexpr float LOWEST = DIGITS == 3 ? 65536 : 256, MOST = DIGITS == 3 ? 8355704 / LOWEST : 32639 / LOWEST;
    bool is_finite = largest < INFINITY;
    float by = is_finite ? MOST / std::max(largest, 0x1p-118f) : 0;  // a float32 too, whatever is divided by
    if (BINARY) by = from_bits(bits_of(by) & 0x7F800000);
    digits.step = is_finite ? 1 / by : NAN;
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 scaled = load<__m512>(numbers + i) * _mm512_set1_ps(by) * _mm512_set1_ps(LOWEST);
        __m512i whole = _mm512_maskz_cvtps_epi32(is_finite ? 0xFFFF : 0, scaled);
        if (DIGITS == 2) whole = _mm512_slli_epi32(whole, 8);
        // Digits that are 128 too large do not carry.
        __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, half), half);
        bytes = _mm512_shuffle_epi8(bytes, order);
        sums = _mm512_dpbusd_epi32(sums, ones, bytes);
        _mm512_storeu_si512(digits.quads + i, bytes);
    }
    __m256i fours = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(digits.begins), _mm_mullo_epi32(sum, _mm_set1_epi32(-centre)));
}

// Whether `count` numbers are about as exact in so many digits as in float32, or half precision's; not where the largest
// is far beyond most of the others, and these are not of few bits, nor where one is not finite.
template <int64_t DIGITS>
inline bool keeps(const float *numbers, int64_t count, float largest, const Digits &digits) {
    constexpr float LOWEST = DIGITS == 3 ? 65536 : 256, MOST_LOST = DIGITS == 3 ? 0x1p-16f : 0x1p-8f;
    Vector unit = all(digits.step / LOWEST), lost = all(0.0f), kept = all(0.0f);
    const Integers magnitude = (Integers)all(0.0f) + 0x7FFFFFFF;
    for (int64_t i = 0; i < count; i += LANES) {
        Vector x = load<Vector>(numbers + i);
        Vector rest = x - (Vector)_mm512_roundscale_ps((__m512)(x / unit), _MM_FROUND_CUR_DIRECTION) * unit;
        Vector most = all(largest / 256), size = (Vector)((Integers)x & magnitude);
        lost += (Vector)((Integers)rest & magnitude);
        kept += (Vector)_mm512_min_ps((__m512)most, (__m512)size);
    }
    return sum_of(lost) <= sum_of(kept) * MOST_LOST;
}

// Adds the products of codes and digits, four to a lane. Of the compiler's own function g++ 12 moves every sum to and fro.
inline void add_products(__m512i &sum, __m512i codes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

// CodeQuads `[parts, apart, vectors]`, of each part so many quads.
struct CodeQuads {
    const __m512i *at;
    int64_t vectors, parts, apart, quads;
};

// Adds the sums of the products of `ROWS` rows of digits and two vectors of codes to `out[row * row_out + 0 .. 31]`, times
// what the digits are worth, and the rows' offsets; or sets them, as they are, where there are no offsets. Meanwhile as many
// lines a quad are fetched from what is read next: processors do not foresee it where there is so much to compute.
template <int64_t ROWS, int64_t DIGITS, int64_t LINES>
[[gnu::noinline]] void multiply(const Digits *rows, CodeQuads codes, const char *ahead, const float *offsets, float *out,
                                int64_t row_out) {
    __m512i sums[ROWS][DIGITS][2];
    const int32_t *digits[ROWS];
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++) {
        digits[r] = rows[r].quads;
#pragma GCC unroll 3
        for (int64_t d = 0; d < DIGITS; d++) sums[r][d][0] = sums[r][d][1] = _mm512_set1_epi32(rows[r].begins[d]);
    }
    for (int64_t part = 0; part < codes.parts; part++) {
        const __m512i *at = codes.at + part * codes.apart * codes.vectors;
        int64_t offset = part * codes.apart * QUAD;
        for (int64_t i = 0; i < codes.quads; i++, at += codes.vectors, offset += QUAD) {
#pragma GCC unroll 2
            for (int64_t line = 0; line < LINES; line++, ahead += BLOCK) _mm_prefetch(ahead, _MM_HINT_T0);
            __m512i first = at[0], second = at[1];
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
                for (int64_t d = 0; d < DIGITS; d++) {
                    __m512i digit = _mm512_set1_epi32(digits[r][offset + d]);
                    add_products(sums[r][d][0], first, digit);
                    add_products(sums[r][d][1], second, digit);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++, out += row_out) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < 2; v++) {
            __m512 sum = _mm512_cvtepi32_ps(sums[r][0][v]);
            sum += _mm512_cvtepi32_ps(sums[r][1][v]) * _mm512_set1_ps(0x1p-8f);
            if (DIGITS == 3) sum += _mm512_cvtepi32_ps(sums[r][DIGITS - 1][v]) * _mm512_set1_ps(0x1p-16f);
            if (offsets) {
                sum = load<__m512>(out + v * LANES) + _mm512_set1_ps(offsets[r]) + sum * _mm512_set1_ps(rows[r].step);
            }
            _mm512_storeu_ps(out + v * LANES, sum);
        }
    }
}

// Adds those of the lowest digits of one row and of a few of its quads to `out[VECTORS]`.
template <int64_t VECTORS>
inline void multiply_few(const Digits &row, const __m512i *codes, const int32_t *quads, int64_t count, Vector *out) {
    __m512i sums[VECTORS];
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; v++) sums[v] = _mm512_set1_epi32(row.begins[2]);
    for (int64_t i = 0; i < count; i++) {
        __m512i digit = _mm512_set1_epi32(row.quads[quads[i] * QUAD + 2]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; v++) add_products(sums[v], codes[quads[i] * VECTORS + v], digit);
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; v++) out[v] += (Vector)_mm512_cvtepi32_ps(sums[v]) * 0x1p-16f;
}

// The codes of one vector of bytes, unsigned: of int4 those of one part.
template <int64_t CODEC> inline __m512i codes_of(__m512i bytes, int64_t part) {
    if (CODEC == INT8) return _mm512_xor_si512(bytes, _mm512_set1_epi8(int8_t(0x80)));
    return _mm512_and_si512(part ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

// One block of `ROWS` rows, `left` of which there are. What stands for others is not used.
template <int64_t ROWS>
inline void read_block(const char *data, int64_t row_bytes, int64_t left, __mmask64 bytes, __m512i *x) {
    if (left < ROWS) {
        for (int64_t i = 0; i < ROWS; i++) {
            x[i] = _mm512_maskz_loadu_epi8(bytes, data + std::min(i, left - 1) * row_bytes);
        }
        return;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < ROWS; i += QUAD, data += QUAD * row_bytes) {
        asm("" : "+r"(data));  // g++ 12 would keep the addresses of all rows
        x[i] = _mm512_maskz_loadu_epi8(bytes, data);
        x[i + 1] = _mm512_maskz_loadu_epi8(bytes, data + row_bytes);
        x[i + 2] = _mm512_maskz_loadu_epi8(bytes, data + 2 * row_bytes);
        x[i + 3] = _mm512_maskz_loadu_epi8(bytes, data + 3 * row_bytes);
    }
}

// The codes of `count` rows `[parts, quads of dims, vectors]`, a lane a token, to multiply queries with.
template <int64_t CODEC>
inline void read_across(const Coded<CODEC> &coded, const char *data, int64_t count, int64_t vectors, __m512i *out) {
    for (int64_t v = 0; v * LANES < count; v++) {
        const char *rows = data + v * LANES * coded.bytes;
        for (int64_t block = 0; block < coded.blocks; block++) {
            __m512i x[LANES];
            read_block<LANES>(rows + block * BLOCK, coded.bytes, count - v * LANES, coded.bytes_of(block), x);
            transpose(x);
            for (int64_t part = 0; part < coded.PARTS; part++) {
                __m512i *to = out + (part * coded.blocks + block) * LANES * vectors + v;
#pragma GCC unroll 16
                for (int64_t i = 0; i < LANES; i++) to[i * vectors] = codes_of<CODEC>(x[i], part);
            }
        }
    }
}

// The codes of `count` rows `[quads of tokens, parts, blocks, 4]`, a lane a dim, to multiply weights with. Of each 128 bits
// of a block the first of the 4 vectors has the first four dims, and so on.
template <int64_t CODEC>
inline void read_along(const Coded<CODEC> &coded, const char *data, int64_t count, __m512i *out) {
    int64_t vectors = coded.PARTS * coded.blocks * 4;
    for (int64_t t = 0; t < count; t += QUAD, out += vectors) {
        const char *rows = data + t * coded.bytes;
        for (int64_t block = 0; block < coded.blocks; block++) {
            __m512i x[QUAD];
            read_block<QUAD>(rows + block * BLOCK, coded.bytes, count - t, coded.bytes_of(block), x);
            __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
            __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
            x[0] = _mm512_unpacklo_epi16(a, c), x[1] = _mm512_unpackhi_epi16(a, c);
            x[2] = _mm512_unpacklo_epi16(b, d), x[3] = _mm512_unpackhi_epi16(b, d);
            for (int64_t part = 0; part < coded.PARTS; part++) {
#pragma GCC unroll 4
                for (int64_t i = 0; i < 4; i++) out[(part * coded.blocks + block) * 4 + i] = codes_of<CODEC>(x[i], part);
            }
        }
    }
}

// Puts sums `[parts, blocks, 4]` vectors, in the order of `read_along`, in that of the dims: `out[width]`.
template <int64_t CODEC> inline void put_in_order(const Coded<CODEC> &coded, const float *sums, int64_t width, float *out) {
    for (int64_t i = 0; i < width; i++) {
        // Of a block's 64 dims four in a row lie in a vector, the next four in the next.
        int64_t place = coded.place(i), in_block = place % BLOCK, vector = in_block / QUAD % 4;
        out[i] = sums[place - in_block + vector * LANES + in_block / LANES * QUAD + in_block % QUAD];
    }
}

}  // namespace hfkv
#else
#define HFKV_HAS_INTEGERS 0
#endif
