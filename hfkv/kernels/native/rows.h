// The rows of planes, as float32.

#pragma once

#include "common.h"
#include "levels.h"
#include "trellis.h"
#include "vectors.h"

namespace hfkv {

// By which the exponent of an fp8 number is too low where its bits stand in a float32's.
constexpr float FP8_SCALE = 0x1p120f;

inline Vector from_fp8(Naturals bits) {
    return (Vector)(((bits & 0x80) << 24) | ((bits & 0x7F) << 20)) * FP8_SCALE;
}

// The numbers of one stored row as float32 `[width]`, without its scale. What is left of a row, and where a register holds
// less than 16 all of it, is as simple as compilers make vectors of by themselves.
template <int64_t CODEC> inline void read_row(const char *__restrict row, int64_t width, float *__restrict out) {
    const uint8_t *codes = reinterpret_cast<const uint8_t *>(row);
    int64_t i = 0;
    if (CODEC == NONE_F32) {
        std::memcpy(out, row, 4 * width);
    } else if (CODEC == INT3) {
        read_levels(codes, width, out);
    } else if (CODEC == INT2) {
        read_string(codes, width, out);
    } else if (CODEC == INT4) {
        int64_t half = (width + 1) / 2;
        for (; NATIVE == LANES && i + LANES <= width - half; i += LANES) {
            Naturals both = widen_codes(codes + i);
            store(out + i, __builtin_convertvector((Integers)(both & 15) - 8, Vector));
            store(out + half + i, __builtin_convertvector((Integers)(both >> 4) - 8, Vector));
        }
        for (int64_t j = i; j < half; j++) out[j] = float(int(codes[j] & 15) - 8);
        for (int64_t j = i; j < width - half; j++) out[half + j] = float(int(codes[j] >> 4) - 8);
    } else {
#pragma GCC unroll 4
        for (; NATIVE == LANES && i + LANES <= width; i += LANES) {
            if (CODEC == INT8) store(out + i, __builtin_convertvector(widen_bytes(row + i), Vector));
            if (CODEC == FP8) store(out + i, from_fp8(widen_codes(row + i)));
            if (CODEC == NONE_BF16) store(out + i, (Vector)(widen_halves(row + 2 * i) << 16));
        }
        for (; i < width; i++) {
            if (CODEC == INT8) out[i] = float(int8_t(codes[i]));
            if (CODEC == FP8) {
                uint32_t code = codes[i];
                out[i] = from_bits(((code & 0x80) << 24) | ((code & 0x7F) << 20)) * FP8_SCALE;
            }
            if (CODEC == NONE_BF16) out[i] = from_bf16(load<uint16_t>(row + 2 * i));
        }
    }
}

inline int64_t number_bytes(int64_t codec) { return codec == NONE_F32 ? 4 : codec == NONE_BF16 ? 2 : 1; }

inline int64_t row_bytes(int64_t codec, int64_t width) {
    if (codec == NONE_F32) return 4 * width;
    if (codec == NONE_BF16) return 2 * width;
    if (codec == INT3) return bytes_of_levels(width);
    if (codec == INT2) return bytes_of_string(width);
    return codec == INT4 ? (width + 1) / 2 : width;
}

}  // namespace hfkv
