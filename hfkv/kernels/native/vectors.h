// 16 numbers at a time: what compilers make of them is the processor's own.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hfkv {

constexpr int64_t LANES = 16;

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Naturals __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Codes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIntegers __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// What a register holds, for what must stay in registers: compilers keep longer vectors in memory.
#if defined(__AVX512F__)
constexpr int64_t NATIVE = 16;
#elif defined(__AVX__)
constexpr int64_t NATIVE = 8;
#else
constexpr int64_t NATIVE = 4;
#endif
typedef float Native __attribute__((vector_size(4 * NATIVE)));

template <typename T> inline T load(const void *at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
}

template <typename T> inline void store(float *at, T x) { std::memcpy(at, &x, sizeof(x)); }

// 16 stored numbers, each in 32 bits. Compilers take several steps where processors have one.
inline Integers widen_bytes(const void *at) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtepi8_epi32(load<__m128i>(at));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(at), Shorts), Integers);
#endif
}

inline Naturals widen_codes(const void *at) {
#if defined(__AVX512F__)
    return (Naturals)_mm512_cvtepu8_epi32(load<__m128i>(at));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Codes>(at), Halves), Naturals);
#endif
}

inline Naturals widen_halves(const void *at) {
#if defined(__AVX512F__)
    return (Naturals)_mm512_cvtepu16_epi32(load<__m256i>(at));
#else
    return __builtin_convertvector(load<Halves>(at), Naturals);
#endif
}

inline Vector all(float x) { return Vector{} + x; }

inline Vector select(Integers where, Vector yes, Vector no) {
    return (Vector)((where & (Integers)yes) | (~where & (Integers)no));
}

// The larger numbers of two, those of `b` where those of `a` are NaNs.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}

// The lanes that are `x`, a bit each.
inline uint32_t lanes_that_are(float x, Vector of) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)of, (__m512)all(x), _CMP_EQ_OQ);
#else
    uint32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= uint32_t(of[i] == x) << i;
    return found;
#endif
}

// exp(x) to 2 units in the last place; 0 below -87, NaN stays NaN. After Cephes' expf.
inline Vector exp(Vector x) {
    Vector clamped = larger(all(-87.0f), x);
    Vector shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2 ** 23: rounds to a whole number
    Vector n = shifted - 12582912.0f;
    Vector r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)all(-87.0f), _CMP_NLT_UQ);
    return (Vector)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
#else
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector found = p * (Vector)power;
    found = select(x < -87.0f, all(0.0f), found);
    return select(x == x, found, x);
#endif
}

#if defined(__AVX512F__)
// One vector of lanes of two others: 0 .. 15 are those of `a`, 16 .. 31 those of `b`.
template <int... LANE> inline Vector pick(Vector a, Vector b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, LANE...);
#else
    return __builtin_shuffle(a, b, Integers{LANE...});
#endif
}

inline Vector fold_singles(Vector a, Vector b) {
    return pick<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b) +
           pick<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
}

inline Vector fold_pairs(Vector a, Vector b) {
    return pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b) +
           pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
}

inline Vector fold_halves(Vector a, Vector b) {
    return pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b) +
           pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
}

inline Vector fold_fours(Vector a, Vector b) {
    return pick<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a, b) +
           pick<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a, b);
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

// The sums of the lanes of 16 vectors, as one vector.
inline Vector sums_of(const Vector *x) {
    Vector fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Vector *of = x + 4 * i;
        fours[i] = fold_pairs(fold_singles(of[0], of[1]), fold_singles(of[2], of[3]));
    }
    return fold_fours(fold_halves(fours[0], fours[1]), fold_halves(fours[2], fours[3]));
}
#else
template <int... LANE> inline Quad pick(Quad a, Quad b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, LANE...);
#else
    return __builtin_shuffle(a, b, QuadIntegers{LANE...});
#endif
}

inline Quad fold(Native x) {
    Quad of[NATIVE / 4], sum = {};
    std::memcpy(of, &x, sizeof(of));
    for (int i = 0; i < NATIVE / 4; i++) sum += of[i];
    return sum;
}

// The same in vectors of four, which all processors have: compilers take longer ones apart to shuffle them.
inline Vector sums_of(const Native *x) {
    Quad sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        Quad a = fold(x[4 * i]), b = fold(x[4 * i + 1]), c = fold(x[4 * i + 2]), d = fold(x[4 * i + 3]);
        Quad ab = pick<0, 4, 1, 5>(a, b) + pick<2, 6, 3, 7>(a, b), cd = pick<0, 4, 1, 5>(c, d) + pick<2, 6, 3, 7>(c, d);
        sums[i] = pick<0, 1, 4, 5>(ab, cd) + pick<2, 3, 6, 7>(ab, cd);
    }
    return load<Vector>(sums);
}
#endif

// The lanes from the last one on.
inline Native reversed(Native x) {
#if defined(__AVX512F__)
    return pick<15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0>(x, x);
#else
    Native found;
    for (int64_t i = 0; i < NATIVE; i++) found[i] = x[NATIVE - 1 - i];
    return found;
#endif
}

// Stores the lanes of two in turn.
inline void store_alternating(float *at, Vector a, Vector b) {
#if defined(__AVX512F__)
    store(at, pick<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(a, b));
    store(at + LANES, pick<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(a, b));
#else
    for (int64_t i = 0; i < LANES; i++) at[2 * i] = a[i], at[2 * i + 1] = b[i];
#endif
}

// Two numbers in turn.
inline Native alternate(const float *two) {
    typedef int64_t Pairs __attribute__((vector_size(sizeof(Native))));
    return (Native)(Pairs{} + load<int64_t>(two));
}

// Keeps a vector in a register, which g++ would read again for each product.
inline void keep(Native &x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#endif
}

inline float sum_of(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lanes[LANES];
    store(lanes, x);
    for (int count = 8; count; count /= 2) {
        for (int i = 0; i < count; i++) lanes[i] += lanes[i + count];
    }
    return lanes[0];
#endif
}

// There are no NaNs.
inline float largest_of(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lanes[LANES];
    store(lanes, x);
    for (int count = 8; count; count /= 2) {
        for (int i = 0; i < count; i++) lanes[i] = lanes[i + count] > lanes[i] ? lanes[i + count] : lanes[i];
    }
    return lanes[0];
#endif
}

}  // namespace hfkv
