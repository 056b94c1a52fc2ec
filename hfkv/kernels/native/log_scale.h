// Scales of eight bits, as `hfkv.codecs.log_scale` has them.

#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"
#include "vectors.h"

namespace hfkv {

constexpr uint8_t ZEROS = 0, NO_NUMBERS = 255;
constexpr int SCALE_STEPS = 8, OCTAVES_BELOW = 21;

// The scales that all bytes stand for.
struct LogScales {
    LogScales() {
        constexpr float MANTISSAS[SCALE_STEPS] = {1.0f,       1.09375f,   1.1875f,    1.296875f,
                                                    1.4140625f, 1.5390625f, 1.6796875f, 1.8359375f};
        for (int i = 0; i < 256; i++) of[i] = std::ldexp(MANTISSAS[i % SCALE_STEPS], i / SCALE_STEPS - OCTAVES_BELOW);
        of[ZEROS] = 0, of[NO_NUMBERS] = NAN;
    }

    float of[256];
};
inline const LogScales log_scales;

inline float from_log_scale(uint8_t byte) { return log_scales.of[byte]; }

inline Vector from_log_scales(Naturals bytes) {
    // The seven bits behind the exponent, of the first four steps of an octave and of the others.
    const Vector first = (Vector)(Naturals{} + 0x26180C00), others = (Vector)(Naturals{} + 0x6B574535);
    Naturals mantissas = (Naturals)select((Integers)((bytes & 4) == 0), first, others);
    Naturals mantissa = mantissas >> (bytes & 3) * 8 & 0xFF, exponent = (bytes >> 3) + (127 - OCTAVES_BELOW);
    Vector scale = (Vector)(exponent << 23 | mantissa << 16);
    scale = select((Integers)(bytes == ZEROS), all(0.0f), scale);
    return select((Integers)(bytes == NO_NUMBERS), all(NAN), scale);
}

inline bool has_numbers(uint8_t byte) { return byte != ZEROS && byte != NO_NUMBERS; }

// The byte of the scale so many steps away, as far as there is one.
inline uint8_t shifted(int byte, int by) {
    return uint8_t(byte + by < 1 ? 1 : byte + by >= NO_NUMBERS ? NO_NUMBERS - 1 : byte + by);
}

// Sums numbers in the order of `row_sums`: the second half is added to the first one, and so on. What they were is lost.
inline float row_sum(float *x, int64_t width) {
    int64_t half = 1;
    while (2 * half < width) half *= 2;
    for (int64_t i = 0; i < width - half; i++) x[i] += x[half + i];
    for (half /= 2; half; half /= 2) {
        for (int64_t i = 0; i < half; i++) x[i] += x[half + i];
    }
    return x[0];
}

// The byte of the scale next to the root of `square`.
inline uint8_t nearest_scale(float square) {
    uint32_t bits = bits_of(square) & 0x7FFFFFFF, rest = bits & 0x7FFFFF;
    int step = int(bits >> 23) * (SCALE_STEPS / 2) + SCALE_STEPS * OCTAVES_BELOW - SCALE_STEPS / 2 * 127;
    for (uint32_t bound : {0xB95C2, 0x25FED7, 0x45672A, 0x6AC0C7}) step += rest >= bound;
    return uint8_t(step < ZEROS ? ZEROS : step > NO_NUMBERS ? NO_NUMBERS : step);
}

// The sum of a row's squares; and, given that, the byte of the scale that brings its root mean square next to `unit`.
inline float squares_of(const float *row, int64_t width, float *scratch) {
    for (int64_t i = 0; i < width; i++) scratch[i] = row[i] * row[i];
    return row_sum(scratch, width);
}

inline uint8_t scale_of_row(float squares, int64_t width, double unit) {
    return nearest_scale(squares * float(1.0 / (double(width) * unit * unit)));
}

// The scale that suits the codes of a row, and what it costs.
struct BestScale {
    uint8_t byte;
    float cost;
};

inline BestScale best_scale(float squares, float products, float of_codes) {
    constexpr float ALONG = 16;
    float along = products * products / squares * ALONG;
    float scale = products * (1 + ALONG) / (of_codes + along);
    uint8_t byte = shifted(nearest_scale(scale * scale), 0);
    scale = from_log_scale(byte);
    float share = scale * products / squares, missing = share - 1;
    return {byte, scale * scale * of_codes / squares - share * 2 + missing * missing * ALONG};
}

}  // namespace hfkv
