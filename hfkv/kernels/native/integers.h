// Products of codes and float32 numbers in exact integers, where processors multiply bytes four to a lane.
// A number becomes three digits of base 256, -128 .. 127 each: a whole multiple of the largest of its row / 2 ** 23, about
// as exact as float32. Codes are made unsigned, as the instruction wants one of its factors: int8's plus 128, int4's as they
// are stored; what they are too large by, times the sum of the digits, is what a sum begins with. A lane is a token where
// scores are summed, over the dims, and a dim where values are, over the tokens: so lanes are never summed.

#pragma once

#include <algorithm>

#include "common.h"
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HFKV_HAS_INTEGERS 1

namespace hfkv {

// Bytes of a vector; digits of a number, and the room of those of four numbers.
#ifndef HINT
#define HINT _MM_HINT_T0
#endif
constexpr int64_t BLOCK = 64, DIGITS = 3, QUAD = 4;
// What three digits hold, 8355711, less what products that are rounded may be too large by; and by the square of the base.
constexpr float MOST_DIGITS = 8355704.0f, MOST_DIGITS_SCALED = 8355704.0f / 65536;

// How the codes of one row lie: in `parts` nibbles or one byte, and what they are too large by.
template <int64_t CODEC> struct Coded {
    static constexpr int64_t PARTS = CODEC == INT4 ? 2 : 1, CENTRE = CODEC == INT4 ? 8 : 128;

    explicit Coded(int64_t width) : bytes((width + PARTS - 1) / PARTS), blocks((bytes + BLOCK - 1) / BLOCK) {}

    // Numbers of a row, each part filled up to whole blocks, and where one of them is among those.
    int64_t padded() const { return PARTS * blocks * BLOCK; }
    int64_t place(int64_t i) const { return i < bytes ? i : i - bytes + blocks * BLOCK; }
    __mmask64 bytes_of(int64_t block) const {
        int64_t left = bytes - block * BLOCK;
        return left >= BLOCK ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    }

    int64_t bytes, blocks;
};

// What a row of numbers is as integers.
struct Digits {
    int32_t *quads;     // [quads, 4]: the highest digits of four numbers, the middle ones, the lowest
    int32_t begins[4];  // what the sums of products with codes begin with
    float step;         // what 65536 times a unit is worth; NaN where a number is not finite
};

// Splits `count` numbers, a multiple of 16.
inline void split(const float *numbers, int64_t count, int32_t centre, Digits &digits) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 12, 8, 4, 0, 13, 9, 5, 1, 14, 10, 6, 2));
    const __m512i ones = _mm512_set1_epi8(1), half = _mm512_set1_epi32(0x808080);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        // As integers, magnitudes are in the same order, and those that are not finite the largest.
        most = _mm512_max_epi32(most, _mm512_and_si512(load<__m512i>(numbers + i), _mm512_set1_epi32(0x7FFFFFFF)));
    }
    float largest = from_bits(uint32_t(_mm512_reduce_max_epi32(most)));
    bool is_finite = largest < INFINITY;
    float by = is_finite ? MOST_DIGITS_SCALED / std::max(largest, 0x1p-118f) : 0;
    digits.step = is_finite ? std::max(largest, 0x1p-118f) / MOST_DIGITS_SCALED : NAN;
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 scaled = load<__m512>(numbers + i) * _mm512_set1_ps(by) * _mm512_set1_ps(65536.0f);
        __m512i whole = is_finite ? _mm512_cvtps_epi32(scaled) : _mm512_setzero_si512();
        // Digits that are 128 too large do not carry.
        __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, half), half);
        bytes = _mm512_shuffle_epi8(_mm512_and_si512(bytes, _mm512_set1_epi32(0xFFFFFF)), order);
        sums = _mm512_dpbusd_epi32(sums, ones, bytes);
        _mm512_storeu_si512(digits.quads + i, bytes);
    }
    __m256i fours = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(digits.begins), _mm_mullo_epi32(sum, _mm_set1_epi32(-centre)));
}

// Adds the products of codes and digits, four to a lane. Of the compiler's own function g++ 12 moves every sum to and fro.
inline void add_products(__m512i &sum, __m512i codes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

// The sums of the products of `ROWS` rows of digits and of codes `[parts, apart, vectors]`, the first `quads` of each part
// of which count: of two vectors from `codes` on, in units of the rows' steps, to `out[row * row_out + 0 .. 31]`.
template <int64_t ROWS>
[[gnu::noinline]] inline void multiply(const Digits *rows, const __m512i *codes, int64_t vectors, int64_t parts, int64_t apart,
                     int64_t quads, float *out, int64_t row_out, const char *ahead, int64_t ahead_step) {
    __m512i sums[ROWS][DIGITS][2];
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++) {
#pragma GCC unroll 3
        for (int64_t d = 0; d < DIGITS; d++) sums[r][d][0] = sums[r][d][1] = _mm512_set1_epi32(rows[r].begins[d]);
    }
    const int32_t *digits[ROWS];
#pragma GCC unroll 4
    for (int64_t r = 0; r < ROWS; r++) digits[r] = rows[r].quads;
    for (int64_t part = 0; part < parts; part++) {
        const __m512i *at = codes + part * apart * vectors;
        int64_t offset = part * apart * QUAD;
        for (int64_t i = 0; i < quads; i++, at += vectors, offset += QUAD) {
            _mm_prefetch(ahead, HINT);
            _mm_prefetch(ahead + BLOCK, HINT);
            ahead += ahead_step;
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
    for (int64_t r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < 2; v++) {
            __m512 sum = _mm512_cvtepi32_ps(sums[r][0][v]);
            sum += _mm512_cvtepi32_ps(sums[r][1][v]) * _mm512_set1_ps(0x1p-8f);
            sum += _mm512_cvtepi32_ps(sums[r][2][v]) * _mm512_set1_ps(0x1p-16f);
            _mm512_storeu_ps(out + r * row_out + v * LANES, sum);
        }
    }
}

// Rows and columns of 32 bits change places.
inline void transpose(__m512i *x) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    // x[4 * i + j]: column 4 * k + j of rows 4 * i .. 4 * i + 3 in its 128 bits number k.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), b = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xDD);
        __m512i c = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88), d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xDD);
        y[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        y[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        y[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
        y[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

// The codes of one vector of bytes, unsigned: of int4 those of one part.
template <int64_t CODEC> inline __m512i codes_of(__m512i bytes, int64_t part) {
    if (CODEC == INT8) return _mm512_xor_si512(bytes, _mm512_set1_epi8(int8_t(0x80)));
    return _mm512_and_si512(part ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

// The codes of `count` rows `[parts, quads of dims, vectors]`, a lane a token, to multiply queries with.
template <int64_t CODEC>
inline void read_across(const Coded<CODEC> &coded, const char *data, int64_t count, int64_t vectors, __m512i *out) {
    for (int64_t v = 0; v * LANES < count; v++) {
        for (int64_t block = 0; block < coded.blocks; block++) {
            __mmask64 bytes = coded.bytes_of(block);
            __m512i x[16];
#pragma GCC unroll 16
            for (int64_t t = 0; t < LANES; t++) {
                // What stands for tokens beyond the last is not used.
                int64_t row = std::min(v * LANES + t, count - 1);
                x[t] = _mm512_maskz_loadu_epi8(bytes, data + row * coded.bytes + block * BLOCK);
            }
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
        for (int64_t block = 0; block < coded.blocks; block++) {
            __mmask64 bytes = coded.bytes_of(block);
            __m512i x[QUAD];
#pragma GCC unroll 4
            for (int64_t i = 0; i < QUAD; i++) {
                int64_t row = std::min(t + i, count - 1);
                x[i] = _mm512_maskz_loadu_epi8(bytes, data + row * coded.bytes + block * BLOCK);
            }
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

// Adds `sums`, in the order of `read_along`, times `by` and `offset` to `out[width]`.
template <int64_t CODEC>
inline void add_sums(const Coded<CODEC> &coded, const float *sums, float by, float offset, int64_t width, float *out) {
    for (int64_t part = 0; part < coded.PARTS; part++) {
        for (int64_t block = 0; block < coded.blocks; block++, sums += BLOCK) {
            __m512 x[4], y[4];
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; i++) x[i] = load<__m512>(sums + i * LANES);
            y[0] = _mm512_shuffle_f32x4(x[0], x[1], 0x44), y[1] = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
            y[2] = _mm512_shuffle_f32x4(x[0], x[1], 0xEE), y[3] = _mm512_shuffle_f32x4(x[2], x[3], 0xEE);
            x[0] = _mm512_shuffle_f32x4(y[0], y[1], 0x88), x[1] = _mm512_shuffle_f32x4(y[0], y[1], 0xDD);
            x[2] = _mm512_shuffle_f32x4(y[2], y[3], 0x88), x[3] = _mm512_shuffle_f32x4(y[2], y[3], 0xDD);
            int64_t begin = part * coded.bytes, end = part ? width : std::min(coded.bytes, width);
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; i++) {
                int64_t at = begin + block * BLOCK + i * LANES;
                if (at >= end) break;
                __mmask16 dims = end - at >= LANES ? 0xFFFF : (1 << (end - at)) - 1;
                __m512 sum = _mm512_maskz_loadu_ps(dims, out + at);
                _mm512_mask_storeu_ps(out + at, dims, sum + x[i] * _mm512_set1_ps(by) + _mm512_set1_ps(offset));
            }
        }
    }
}

}  // namespace hfkv
#else
#define HFKV_HAS_INTEGERS 0
#endif
