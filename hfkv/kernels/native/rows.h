// The rows of planes, as float32.

#pragma once

#include "common.h"
#include "vectors.h"

namespace hfkv {

// By which the exponent of an fp8 number is too low where its bits stand in a float32's.
constexpr float FP8_SCALE = 0x1p120f;

inline Vector from_fp8(Naturals bits) {
    return (Vector)(((bits & 0x80) << 24) | ((bits & 0x7F) << 20)) * FP8_SCALE;
}

// The numbers of one stored row as float32 `[width]`, without its scale.
template <int64_t CODEC> inline void read_row(const char *row, int64_t width, float *out) {
    if (CODEC == NONE_F32) {
        std::memcpy(out, row, 4 * width);
        return;
    }
    if (CODEC == INT4) {
        int64_t half = (width + 1) / 2, i = 0;
        const uint8_t *codes = reinterpret_cast<const uint8_t *>(row);
        for (; i + LANES <= half; i += LANES) {
            Naturals both = widen_codes(codes + i);
            store(out + i, __builtin_convertvector((Integers)(both & 15) - 8, Vector));
            Vector upper = __builtin_convertvector((Integers)(both >> 4) - 8, Vector);
            if (half + i + LANES <= width) {
                store(out + half + i, upper);
            } else {
                for (int64_t j = 0; half + i + j < width; j++) out[half + i + j] = upper[j];
            }
        }
        for (; i < half; i++) {
            out[i] = float(int(codes[i] & 15) - 8);
            if (half + i < width) out[half + i] = float(int(codes[i] >> 4) - 8);
        }
        return;
    }
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + LANES <= width; i += LANES) {
        if (CODEC == INT8) store(out + i, __builtin_convertvector(widen_bytes(row + i), Vector));
        if (CODEC == FP8) store(out + i, from_fp8(widen_codes(row + i)));
        if (CODEC == NONE_BF16) store(out + i, (Vector)(widen_halves(row + 2 * i) << 16));
    }
    for (; i < width; i++) {
        uint8_t byte = uint8_t(row[i * (CODEC == NONE_BF16 ? 2 : 1)]);
        if (CODEC == INT8) out[i] = float(int8_t(byte));
        if (CODEC == FP8) out[i] = from_bits((uint32_t(byte & 0x80) << 24) | (uint32_t(byte & 0x7F) << 20)) * FP8_SCALE;
        if (CODEC == NONE_BF16) out[i] = from_bf16(load<uint16_t>(row + 2 * i));
    }
}

inline int64_t scale_bytes(int64_t codec) { return codec == INT4 ? 4 : codec == INT8 || codec == FP8 ? 2 : 0; }

inline int64_t number_bytes(int64_t codec) { return codec == NONE_F32 ? 4 : codec == NONE_BF16 ? 2 : 1; }

inline int64_t row_bytes(int64_t codec, int64_t width) {
    if (codec == NONE_F32) return 4 * width;
    if (codec == NONE_BF16) return 2 * width;
    return codec == INT4 ? (width + 1) / 2 : width;
}

}  // namespace hfkv
