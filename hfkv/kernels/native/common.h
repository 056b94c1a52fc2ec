// What the native kernels are told, and the numbers that planes hold.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace hfkv {

enum Codec : int64_t { NONE_F32 = 0, NONE_BF16 = 1, INT8 = 2, FP8 = 3, INT4 = 4, INT3 = 5, INT2 = 6 };

// The bytes of a row's scales: plain tokens have none.
constexpr int64_t scale_bytes(int64_t codec) {
    return codec == INT4 ? 4 : codec == INT8 || codec == FP8 ? 2 : codec == INT3 || codec == INT2 ? 1 : 0;
}
inline constexpr bool is_rotated(int64_t codec) { return codec == INT4 || codec == INT3 || codec == INT2; }
enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

// The numbers of `hfkv.kernels.device_inputs`: 16 of them, the rows' pads, three a column, and the block table.
struct Meta {
    const int32_t *numbers;
    int64_t batch, columns;

    int64_t start() const { return numbers[0]; }
    int64_t length() const { return numbers[1]; }
    int64_t last_column() const { return numbers[2]; }
    int64_t last_slot() const { return numbers[3]; }
    int64_t seen() const { return numbers[4]; }
    int64_t first() const { return numbers[5]; }
    int64_t held_from() const { return numbers[6]; }
    int64_t num_slots() const { return numbers[7]; }
    int64_t sinks() const { return numbers[8]; }
    int64_t pads(int64_t row) const { return numbers[16 + row]; }
    int64_t low(int64_t column) const { return numbers[16 + batch + column]; }
    int64_t high(int64_t column) const { return numbers[16 + batch + columns + column]; }
    int64_t begins(int64_t column) const { return numbers[16 + batch + 2 * columns + column]; }
    int64_t page(int64_t row, int64_t column) const {
        return numbers[16 + batch + 3 * columns + row * columns + column];
    }
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// Rounds half to even; a NaN stays one.
inline uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    if (x != x) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 0x1F, mantissa = x & 0x3FF;
    if (exponent == 0x1F) return from_bits(sign | 0x7F800000 | (mantissa << 13));
    if (exponent) return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
    float tiny = float(mantissa) * 5.9604644775390625e-8f;  // 2 ** -24
    return sign ? -tiny : tiny;
}

// Rounds half to even; what is too large becomes infinite.
inline uint16_t to_f16(float x) {
    uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (bits >= 0x477FF000) return uint16_t(sign | 0x7C00);
    if (bits < 0x38800000) {  // subnormal: the sum rounds to multiples of 2 ** -24
        return uint16_t(sign | (bits_of(from_bits(bits) + 0.5f) - 0x3F000000));
    }
    bits += 0xC8000FFF + ((bits >> 13) & 1);
    return uint16_t(sign | (bits >> 13));
}

inline float load_number(const void *at, int64_t dtype, int64_t index) {
    if (dtype == F32) return static_cast<const float *>(at)[index];
    uint16_t half = static_cast<const uint16_t *>(at)[index];
    return dtype == BF16 ? from_bf16(half) : from_f16(half);
}

// So many numbers that lie together, from one on.
inline void load_numbers(const void *at, int64_t dtype, int64_t index, int64_t count, float *out) {
    if (dtype == F32) {
        std::memcpy(out, static_cast<const float *>(at) + index, count * sizeof(float));
        return;
    }
    const uint16_t *halves = static_cast<const uint16_t *>(at) + index;
    if (dtype == BF16) {
        for (int64_t i = 0; i < count; i++) out[i] = from_bf16(halves[i]);
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = from_f16(halves[i]);
    }
}

inline void store_number(void *at, int64_t dtype, int64_t index, float x) {
    if (dtype == F32) {
        static_cast<float *>(at)[index] = x;
    } else {
        static_cast<uint16_t *>(at)[index] = dtype == BF16 ? to_bf16(x) : to_f16(x);
    }
}

// The orthonormal Walsh-Hadamard transform of a row, in blocks of the largest power of two that divides its width. Each
// sum is one of two numbers and rounded once, so that it is the same bits as torch's operations give.
inline void rotate(float *row, int64_t width) {
    int64_t block = width & -width;
    float scale = float(1.0 / std::sqrt(double(block)));
    for (int64_t begin = 0; begin < width; begin += block) {
        float *x = row + begin;
        for (int64_t half = 1; half < block; half *= 2) {
            for (int64_t i = 0; i < block; i += 2 * half) {
                for (int64_t j = i; j < i + half; j++) {
                    float a = x[j], b = x[j + half];
                    x[j] = a + b;
                    x[j + half] = a - b;
                }
            }
        }
        for (int64_t i = 0; i < block; i++) x[i] *= scale;
    }
}

}  // namespace hfkv
