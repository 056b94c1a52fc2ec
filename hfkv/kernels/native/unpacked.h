// Rows of int3 and int2 as bytes, which are then multiplied as those of int8.

#pragma once

#include <vector>

#include "call.h"
#include "rows.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define HFKV_HAS_BIT_FIELDS 1
#else
#define HFKV_HAS_BIT_FIELDS 0
#endif

namespace hfkv {

// By level and sign; what bits above these say makes no difference.
struct alignas(64) SignedLevels {
    SignedLevels() {
        for (int i = 0; i < 64; i++) of[i] = int8_t(i & 4 ? -LEVELS[i & 3] : LEVELS[i & 3]);
    }
    int8_t of[64];
};
inline const SignedLevels signed_levels;

template <int64_t CODEC> class Unpacked {
  public:
    explicit Unpacked(int64_t width) : width(width), bytes(row_bytes(CODEC, width)) {
#if HFKV_HAS_BIT_FIELDS
        if (bytes > 64) return;
        fields.resize((width + 63) / 64);
        for (int64_t i = 0; i < width; i++) CODEC == INT3 ? place_level(i) : place_window(i);
#endif
    }

    // Unpacks `count` rows, `[count, width]`, while those ahead are fetched.
    const char *read(const char *rows, int64_t count, const char *ahead) {
        out.resize(MOST_TILE * width + 64);
        for (int64_t t = 0; t < count; t++, rows += bytes, ahead += bytes) {
            __builtin_prefetch(ahead);
            read_one(reinterpret_cast<const uint8_t *>(rows), reinterpret_cast<int8_t *>(&out[t * width]));
        }
        return out.data();
    }

  private:
    inline void read_one(const uint8_t *row, int8_t *to) const {
#if HFKV_HAS_BIT_FIELDS
        if (!fields.empty()) {
            __m512i codes = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - bytes), row);
            for (const Fields &of : fields) {
                // What is behind a row is written over by the next one.
                _mm512_storeu_si512(to, CODEC == INT3 ? levels_of(codes, of) : windows_of(codes, of));
                to += 64;
            }
            return;
        }
#endif
        CODEC == INT3 ? read_levels(row, width, to) : read_string(row, width, to);
    }

#if HFKV_HAS_BIT_FIELDS
    // For each byte of a vector of numbers, two bytes of the row, and a bit of eight of them from which on it is read.
    struct alignas(64) Fields {
        uint8_t first[64] = {}, second[64] = {}, first_bit[64] = {}, second_bit[64] = {};
    };

    // A level's bits and, above them, its sign.
    void place_level(int64_t i) {
        Fields &of = fields[i / 64];
        int64_t eighth = bytes / 3, part = i / eighth, at = i % eighth, lane = i % 64;
        of.first[lane] = uint8_t(part % 2 * eighth + at), of.first_bit[lane] = uint8_t(lane % 8 * 8 + part / 2 * 2);
        of.second[lane] = uint8_t(2 * eighth + at), of.second_bit[lane] = uint8_t(lane % 8 * 8 + part - 2);
    }

    static inline __m512i levels_of(__m512i row, const Fields &of) {
        __m512i levels = _mm512_permutexvar_epi8(load<__m512i>(of.first), row);
        __m512i signs = _mm512_permutexvar_epi8(load<__m512i>(of.second), row);
        levels = _mm512_multishift_epi64_epi8(load<__m512i>(of.first_bit), levels);
        signs = _mm512_multishift_epi64_epi8(load<__m512i>(of.second_bit), signs);
        // Bits 0 and 1 of the levels, others of the signs.
        __m512i index = _mm512_ternarylogic_epi64(_mm512_set1_epi8(3), levels, signs, 0xCA);
        return _mm512_permutexvar_epi8(index, load<__m512i>(signed_levels.of));
    }

    // A byte and the one before it; both halves of 64 bits have four windows each.
    void place_window(int64_t i) {
        Fields &of = fields[i / 64];
        int64_t quarter = bytes - 1, at = i % quarter, pair = i / quarter, lane = i % 64, in_eight = lane % 8;
        int64_t from = lane / 16 * 16 + in_eight / 4 * 8 + lane / 8 % 2 * 4 + in_eight % 4;
        of.first[from] = uint8_t(at), of.second[from] = uint8_t(at + 1);
        of.first_bit[lane] = uint8_t(in_eight % 4 * 16 + 10 - 2 * PAIRS + 2 * pair);
    }

    static inline __m512i windows_of(__m512i row, const Fields &of) {
        __m512i before = _mm512_permutexvar_epi8(load<__m512i>(of.first), row);
        __m512i bytes = _mm512_permutexvar_epi8(load<__m512i>(of.second), row), bits = load<__m512i>(of.first_bit);
        __m512i low = _mm512_multishift_epi64_epi8(bits, _mm512_unpacklo_epi8(before, bytes));
        __m512i high = _mm512_multishift_epi64_epi8(bits, _mm512_unpackhi_epi8(before, bytes));
        __m512i windows = _mm512_mask_blend_epi8(0xF0F0F0F0F0F0F0F0u, low, high);
        const int8_t *numbers = trellis.stored_numbers;
        __m512i lower = _mm512_permutex2var_epi8(load<__m512i>(numbers), windows, load<__m512i>(numbers + 64));
        __m512i upper = _mm512_permutex2var_epi8(load<__m512i>(numbers + 128), windows, load<__m512i>(numbers + 192));
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(windows), lower, upper);
    }

    std::vector<Fields> fields;
#endif
    int64_t width, bytes;
    std::vector<char> out;
};

}  // namespace hfkv
