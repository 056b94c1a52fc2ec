// Products of rows with an expert's matrix as it is stored: a block of outputs is decoded where the first caches hold
// it, and all rows meet it there. The sums of an output are taken in an order that depends on its inputs alone: the number
// of threads changes no bit.

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "common.h"
#include "threads.h"
#include "vectors.h"

namespace hfkv {
namespace {

// GROUP inputs share a step and a centre in int4. BLOCK outputs are decoded together, and ROWS rows meet them while they
// are in the second cache; the sums of OUTPUTS outputs and FEW rows are in registers. PAD numbers behind a row keep rows
// of a power of two apart in the caches. Measured on an EPYC (AVX-512 with bf16) with matrices of 4096 x 1024.
constexpr int64_t GROUP = 32, BLOCK = 32, ROWS = 96, OUTPUTS = NATIVE == LANES ? 8 : 4, FEW = 3, PAD = 32;

using hfkv::store;

// 16 finite numbers, rounded half to even.
inline void store(uint16_t *at, Vector x) {
#if defined(__AVX512BF16__)
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(at, &rounded, sizeof(rounded));
#else
    Naturals bits = (Naturals)x;
    Halves rounded = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);
    std::memcpy(at, &rounded, sizeof(rounded));
#endif
}

// 16 stored numbers, without what they are multiplied by.
inline Vector load_bytes(const void *at) { return __builtin_convertvector(widen_bytes(at), Vector); }

inline Vector load_halves(const void *at) { return (Vector)(widen_halves(at) << 16); }

// The numbers of a part of 16 bytes that is as long as a vector: compilers take longer ones apart, and splat them by memory.
typedef int8_t NativeBytes __attribute__((vector_size(NATIVE)));
typedef int32_t NativeIntegers __attribute__((vector_size(4 * NATIVE)));
typedef int16_t NativeShorts __attribute__((vector_size(2 * NATIVE)));
inline NativeIntegers load_part(const char *at) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (NativeIntegers)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(at)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<NativeBytes>(at), NativeShorts), NativeIntegers);
#endif
}

inline void load_nibbles(const void *at, Vector &low, Vector &high) {
    Naturals both = widen_codes(at);
    low = __builtin_convertvector((Integers)(both & 15) - 8, Vector);
    high = __builtin_convertvector((Integers)(both >> 4) - 8, Vector);
}

// The sums of each vector's lanes, of four vectors.
inline void sums_of(Vector a, Vector b, Vector c, Vector d, float *out) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                               (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    const Vector *all[4] = {&a, &b, &c, &d};
    for (int64_t i = 0; i < 4; i++) {
        out[i] = 0;
        for (int64_t j = 0; j < LANES; j++) out[i] += (*all[i])[j];
    }
#endif
}

// GROUP numbers, for a factor of a product.
struct Pair {
    Vector low, high;
};
inline Pair load_factor(const float *at) { return {load<Vector>(at), load<Vector>(at + LANES)}; }
inline void add(Vector &sums, Pair weights, Pair x) {
    sums += weights.low * x.low;
    sums += weights.high * x.high;
}

#if defined(__AVX512BF16__)
inline __m512bh load_factor(const uint16_t *at) { return (__m512bh)_mm512_loadu_si512(at); }
inline void add(Vector &sums, __m512bh weights, __m512bh x) { sums = (Vector)_mm512_dpbf16_ps((__m512)sums, weights, x); }
#endif

// Where the numbers of some outputs are read: `(m, i)` gives GROUP of output m, from input i on.
template <typename T> struct Plain {
    const T *weights;
    int64_t stride;

    auto operator()(int64_t m, int64_t i) const { return load_factor(weights + m * stride + i); }
    Native part(int64_t m, int64_t i) const { return load<Native>(weights + m * stride + i); }
    Plain from(int64_t m) const { return {weights + m * stride, stride}; }
};

struct Halved {
    const char *weights;
    int64_t stride;

    Pair operator()(int64_t m, int64_t i) const {
        const char *at = weights + m * stride + 2 * i;
        return {load_halves(at), load_halves(at + 2 * LANES)};
    }
    Native part(int64_t m, int64_t i) const {
        typedef uint16_t NativeHalves __attribute__((vector_size(2 * NATIVE)));
        typedef uint32_t NativeNaturals __attribute__((vector_size(4 * NATIVE)));
        const char *at = weights + m * stride + 2 * i;
        return (Native)(__builtin_convertvector(load<NativeHalves>(at), NativeNaturals) << 16);
    }
    Halved from(int64_t m) const { return {weights + m * stride, stride}; }
};

struct Int8 {
    const char *weights;
    int64_t stride;

    Pair operator()(int64_t m, int64_t i) const {
        const char *at = weights + m * stride + i;
        return {load_bytes(at), load_bytes(at + LANES)};
    }
    Native part(int64_t m, int64_t i) const {
        return __builtin_convertvector(load_part(weights + m * stride + i), Native);
    }
    Int8 from(int64_t m) const { return {weights + m * stride, stride}; }
};

struct Int4 {
    const char *weights;
    int64_t stride;
    const float *steps;  // step and centre of BLOCK outputs, one group after the other

    Pair operator()(int64_t m, int64_t i) const {
        const float *its = steps + 2 * (i / GROUP * BLOCK + m);
        Pair numbers;
        load_nibbles(weights + m * stride + i / 2, numbers.low, numbers.high);
        return {numbers.low * its[0] + its[1], numbers.high * its[0] + its[1]};
    }
    Native part(int64_t m, int64_t i) const {
        const float *its = steps + 2 * (i / GROUP * BLOCK + m);
        int64_t in_group = i % GROUP;
        NativeIntegers both = load_part(weights + m * stride + i / GROUP * LANES + in_group % LANES);
        NativeIntegers codes = (in_group < LANES ? both : both >> 4) & 15;
        return __builtin_convertvector(codes - 8, Native) * its[0] + its[1];
    }
    Int4 from(int64_t m) const { return {weights + m * stride, stride, steps + 2 * m}; }
};

#if !defined(__AVX512F__)
// Products of R rows, `apart` from each other, with OUTPUTS outputs; rows of out are BLOCK apart. Sums are as long as the
// vectors that there are, and no more than there are registers for.
template <typename Reader, typename T, int64_t R>
inline void tile(Reader weights, const float *x, int64_t apart, int64_t width, float *out) {
    Native sums[R][OUTPUTS] = {};
    for (int64_t i = 0; i < width; i += GROUP) {
#pragma GCC unroll 8
        for (int64_t k = 0; k < GROUP; k += NATIVE) {
            Native of_rows[R];
#pragma GCC unroll 3
            for (int64_t r = 0; r < R; r++) of_rows[r] = load<Native>(x + r * apart + i + k);
#pragma GCC unroll 4
            for (int64_t m = 0; m < OUTPUTS; m++) {
                Native its = weights.part(m, i + k);
#pragma GCC unroll 3
                for (int64_t r = 0; r < R; r++) sums[r][m] += its * of_rows[r];
            }
        }
    }
    for (int64_t r = 0; r < R; r++) {
        for (int64_t m = 0; m < OUTPUTS; m++) {
            float lanes[NATIVE];
            store(lanes, sums[r][m]);
            for (int64_t count = NATIVE / 2; count; count /= 2) {
                for (int64_t j = 0; j < count; j++) lanes[j] += lanes[j + count];
            }
            out[r * BLOCK + m] = lanes[0];
        }
    }
}
#else
// The same, in AVX-512's registers.
template <typename Reader, typename T, int64_t R>
inline void tile(Reader weights, const T *x, int64_t apart, int64_t width, float *out) {
    Vector sums[R][OUTPUTS] = {};
    for (int64_t i = 0; i < width; i += GROUP) {
        auto x0 = load_factor(x + i), x1 = load_factor(x + (R > 1 ? apart : 0) + i);
        auto x2 = load_factor(x + (R > 2 ? 2 * apart : 0) + i);
#pragma GCC unroll 8
        for (int64_t m = 0; m < OUTPUTS; m++) {
            auto its = weights(m, i);
            add(sums[0][m], its, x0);
            if (R > 1) add(sums[R > 1 ? 1 : 0][m], its, x1);
            if (R > 2) add(sums[R > 2 ? 2 : 0][m], its, x2);
        }
    }
#pragma GCC unroll 3
    for (int64_t r = 0; r < R; r++) {
        sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out + r * BLOCK);
        sums_of(sums[r][4], sums[r][5], sums[r][6], sums[r][7], out + r * BLOCK + 4);
    }
}
#endif

// A matrix [N outputs, K inputs] as it is stored; see `hfkv.kernels.experts.codes`.
struct Matrix {
    int64_t codec, outputs, inputs, stride;  // bytes from one output to the next
    const char *weight;
    const float *scale;      // int8: [N]
    const int8_t *groups;    // int4: [Kp / 32, N, 2]
    const uint16_t *units;   // int4: [N, 2]
    const char *columns;     // [N], int16 or int32, or none
    int64_t column_bytes;

    // Inputs that a row of a block has, those behind the last one zeros.
    int64_t width() const { return (inputs + GROUP - 1) / GROUP * GROUP; }

    int64_t column(int64_t n) const {
        if (!columns) return n;
        return column_bytes == 2 ? load<int16_t>(columns + 2 * n) : load<int32_t>(columns + 4 * n);
    }
};

inline void put(float *out, float x) { *out = x; }
inline void put(uint16_t *out, float x) { *out = to_bf16(x); }

template <int64_t CODEC> inline Vector load_weights(const char *row, int64_t i) {
    if (CODEC == INT8) return load_bytes(row + i);
    if (CODEC == NONE_BF16) return load_halves(row + 2 * i);
    return load<Vector>(row + 4 * i);
}

template <int64_t CODEC> inline float load_weight(const char *row, int64_t i) {
    if (CODEC == INT8) return float(static_cast<int8_t>(row[i]));
    if (CODEC == NONE_BF16) return from_bf16(load<uint16_t>(row + 2 * i));
    return load<float>(row + 4 * i);
}

// Steps and centres of a block of int4, one group after the other.
void read_steps(const Matrix &matrix, int64_t first, int64_t count, float *steps) {
    float units[2 * BLOCK];
    for (int64_t n = 0; n < 2 * count; n++) units[n] = from_bf16(matrix.units[2 * first + n]);
    for (int64_t g = 0; g < matrix.width() / GROUP; g++) {
        const int8_t *codes = matrix.groups + 2 * (g * matrix.outputs + first);
        for (int64_t n = 0; n < 2 * count; n++) steps[2 * BLOCK * g + n] = codes[n] * units[n];
    }
}

// Some outputs' numbers, without the scales of int8, as rows of `width + PAD`.
template <int64_t CODEC, typename T>
void decode(const Matrix &matrix, int64_t first, int64_t count, const float *steps, T *out) {
    int64_t width = matrix.width(), whole = matrix.inputs / LANES * LANES;
    Int4 int4{matrix.weight + first * matrix.stride, matrix.stride, steps};
    for (int64_t n = 0; n < count; n++, out += width + PAD) {
        if (CODEC == INT4) {
            for (int64_t i = 0; i < width; i += GROUP) {
#if defined(__AVX512F__)
                Pair numbers = int4(n, i);
                store(out + i, numbers.low);
                store(out + i + LANES, numbers.high);
#else
                for (int64_t k = 0; k < GROUP; k += NATIVE) store(out + i + k, int4.part(n, i + k));
#endif
            }
            continue;
        }
        const char *row = matrix.weight + (first + n) * matrix.stride;
        for (int64_t i = 0; i < whole; i += LANES) store(out + i, load_weights<CODEC>(row, i));
        for (int64_t i = whole; i < width; i++) put(out + i, i < matrix.inputs ? load_weight<CODEC>(row, i) : 0.0f);
    }
}

template <typename T>
void decode(const Matrix &matrix, int64_t first, int64_t count, const float *steps, T *out) {
    if (matrix.codec == INT4) decode<INT4>(matrix, first, count, steps, out);
    if (matrix.codec == INT8) decode<INT8>(matrix, first, count, steps, out);
    if (matrix.codec == NONE_BF16) decode<NONE_BF16>(matrix, first, count, steps, out);
    if (matrix.codec == NONE_F32) decode<NONE_F32>(matrix, first, count, steps, out);
}

// The products of all rows x with a block of outputs, as `[rows, BLOCK]` of out.
template <typename Reader, typename T>
void multiply(Reader weights, int64_t count, const T *x, int64_t rows, int64_t width, float *out) {
    int64_t apart = width + PAD;
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        int64_t end = std::min(rows, begin + ROWS);
        for (int64_t m = 0; m < count; m += OUTPUTS) {
            for (int64_t r = begin; r < end; r += FEW) {
                const T *some = x + r * apart;
                float *found = out + r * BLOCK + m;
                if (end - r == 1) tile<Reader, T, 1>(weights.from(m), some, apart, width, found);
                if (end - r == 2) tile<Reader, T, 2>(weights.from(m), some, apart, width, found);
                if (end - r >= FEW) tile<Reader, T, FEW>(weights.from(m), some, apart, width, found);
            }
        }
    }
}

template <typename T> void put_row(const Matrix &matrix, int64_t first, int64_t count, const T *numbers, T *out) {
    if (matrix.columns) {
        for (int64_t n = 0; n < count; n++) out[matrix.column(first + n)] = numbers[n];
    } else {
        std::memcpy(out + first, numbers, count * sizeof(T));
    }
}

// Writes sums `[rows, BLOCK]` to the outputs that they are of, times the scales of int8.
void write(const Matrix &matrix, int64_t first, int64_t count, const float *sums, int64_t rows, void *out,
           int64_t dtype, int64_t num_columns) {
    float scales[BLOCK];
    for (int64_t n = 0; n < count; n++) scales[n] = matrix.scale ? matrix.scale[first + n] : 1.0f;
    for (int64_t r = 0; r < rows; r++, sums += BLOCK) {
        float numbers[BLOCK];
        uint16_t halves[BLOCK];
        for (int64_t n = 0; n < count; n++) numbers[n] = sums[n] * scales[n];
        if (dtype == F32) {
            put_row(matrix, first, count, numbers, static_cast<float *>(out) + r * num_columns);
            continue;
        }
        if (dtype == BF16) {
            for (int64_t n = 0; n < count; n++) halves[n] = to_bf16(numbers[n]);
        } else {
            for (int64_t n = 0; n < count; n++) halves[n] = to_f16(numbers[n]);
        }
        put_row(matrix, first, count, halves, static_cast<uint16_t *>(out) + r * num_columns);
    }
}

// Memory that begins where a vector's should.
template <typename T> struct Room {
    std::vector<T> memory;
    T *begin = nullptr;

    void take(int64_t count) {
        memory.resize(count + 64 / sizeof(T));
        begin = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    }
};

// Shares blocks among threads, some tasks of neighbouring ones for each.
template <typename Work> void share_blocks(int64_t threads, int64_t blocks, const Work &work) {
    int64_t tasks = threads > 1 ? std::min(blocks, 8 * threads) : 1;
    share(threads, tasks, [&](int64_t i) { work(i * blocks / tasks, (i + 1) * blocks / tasks); });
}

// As many rows meet numbers that are decoded in registers, again for each FEW of them.
inline int64_t most_direct(int64_t codec) { return codec == INT4 ? FEW : 2 * FEW; }

// T is what rows, and numbers that are decoded, are written as on the way.
template <typename T>
int linear(const Matrix &matrix, const void *x, int64_t rows, void *out, int64_t dtype, int64_t num_columns,
           int64_t threads) {
    int64_t width = matrix.width(), blocks = (matrix.outputs + BLOCK - 1) / BLOCK;
    constexpr int64_t PLAIN = sizeof(T) == 4 ? NONE_F32 : NONE_BF16, OWN = sizeof(T) == 4 ? F32 : BF16;
    // What is met by few rows, or is of the right kind, is read where it lies.
    bool is_whole = width == matrix.inputs && matrix.outputs % OUTPUTS == 0;
    bool is_plain = is_whole && matrix.codec == PLAIN && matrix.stride % sizeof(T) == 0;
    bool is_direct = is_whole && rows <= most_direct(matrix.codec) && OWN == F32;
    std::atomic<int> failure{0};
    Room<T> given;
    try {
        given.take(rows * (width + PAD));
    } catch (const std::bad_alloc &) {
        return 2;
    }
    for (int64_t r = 0; r < rows; r++) {
        T *row = given.begin + r * (width + PAD);
        if (dtype == OWN) {
            std::memcpy(row, static_cast<const T *>(x) + r * matrix.inputs, matrix.inputs * sizeof(T));
        } else {
            for (int64_t i = 0; i < matrix.inputs; i++) put(row + i, load_number(x, dtype, r * matrix.inputs + i));
        }
    }
    share_blocks(threads, blocks, [&](int64_t begin, int64_t end) {
        Room<T> decoded;
        Room<float> steps, sums;
        try {
            if (!is_plain && !is_direct) decoded.take(BLOCK * (width + PAD));
            if (matrix.codec == INT4) steps.take(2 * BLOCK * width / GROUP);
            sums.take(rows * BLOCK);
        } catch (const std::bad_alloc &) {
            failure = 2;
            return;
        }
        for (int64_t first = begin * BLOCK; first < std::min(end * BLOCK, matrix.outputs); first += BLOCK) {
            int64_t count = std::min(BLOCK, matrix.outputs - first);
            const char *at = matrix.weight + first * matrix.stride;
            auto meet = [&](auto weights) { multiply(weights, count, given.begin, rows, width, sums.begin); };
            if (matrix.codec == INT4) read_steps(matrix, first, count, steps.begin);
            if (is_plain) {
                meet(Plain<T>{reinterpret_cast<const T *>(at), matrix.stride / int64_t(sizeof(T))});
            } else if (is_direct && matrix.codec == INT8) {
                if constexpr (OWN == F32) meet(Int8{at, matrix.stride});
            } else if (is_direct && matrix.codec == NONE_BF16) {
                if constexpr (OWN == F32) meet(Halved{at, matrix.stride});
            } else if (is_direct) {
                if constexpr (OWN == F32) meet(Int4{at, matrix.stride, steps.begin});
            } else {
                decode(matrix, first, count, steps.begin, decoded.begin);
                meet(Plain<T>{decoded.begin, width + PAD});
            }
            write(matrix, first, count, sums.begin, rows, out, dtype, num_columns);
        }
    });
    return failure;
}

template <typename T> int numbers(const Matrix &matrix, T *out, int64_t threads) {
    int64_t width = matrix.width();
    std::atomic<int> failure{0};
    share_blocks(threads, (matrix.outputs + BLOCK - 1) / BLOCK, [&](int64_t begin, int64_t end) {
        Room<float> decoded, steps;
        try {
            decoded.take(BLOCK * (width + PAD));
            if (matrix.codec == INT4) steps.take(2 * BLOCK * width / GROUP);
        } catch (const std::bad_alloc &) {
            failure = 2;
            return;
        }
        for (int64_t first = begin * BLOCK; first < std::min(end * BLOCK, matrix.outputs); first += BLOCK) {
            int64_t count = std::min(BLOCK, matrix.outputs - first);
            if (matrix.codec == INT4) read_steps(matrix, first, count, steps.begin);
            decode(matrix, first, count, steps.begin, decoded.begin);
            for (int64_t n = 0; n < count; n++) {
                const float *row = decoded.begin + n * (width + PAD);
                float scale = matrix.scale ? matrix.scale[first + n] : 1.0f;
                T *its = out + matrix.column(first + n) * matrix.inputs;
                for (int64_t i = 0; i < matrix.inputs; i++) put(its + i, row[i] * scale);
            }
        }
    });
    return failure;
}

Matrix matrix_of(const int64_t *shape, const void *weight, const void *scale, const void *groups, const void *units,
                 const void *columns) {
    return Matrix{shape[0],
                  shape[1],
                  shape[2],
                  shape[3],
                  static_cast<const char *>(weight),
                  static_cast<const float *>(scale),
                  static_cast<const int8_t *>(groups),
                  static_cast<const uint16_t *>(units),
                  static_cast<const char *>(columns),
                  shape[4]};
}

}  // namespace
}  // namespace hfkv

// Products of x `[rows, K]` with a matrix, written to its columns of out `[rows, columns]`; 2 where memory is missing.
// shape: codec, N, K, bytes from one output to the next, bytes of a column; then rows, the dtype of x and out, columns
// of out, threads.
extern "C" int hfkv_expert_linear(const int64_t *shape, const void *weight, const void *scale, const void *groups,
                                  const void *units, const void *columns, const void *x, void *out) {
    using namespace hfkv;
    Matrix matrix = matrix_of(shape, weight, scale, groups, units, columns);
    int64_t rows = shape[5], dtype = shape[6];
#if defined(__AVX512BF16__)
    if (dtype == BF16 && (rows > most_direct(matrix.codec) || matrix.codec == NONE_BF16)) {
        return linear<uint16_t>(matrix, x, rows, out, dtype, shape[7], shape[8]);
    }
#endif
    return linear<float>(matrix, x, rows, out, dtype, shape[7], shape[8]);
}

// The numbers of a matrix, decoded to the rows of out `[outputs, K]` that its columns name, float32 or bfloat16; 2 where
// memory is missing. shape: the same five, the dtype of out, threads.
extern "C" int hfkv_expert_numbers(const int64_t *shape, const void *weight, const void *scale, const void *groups,
                                   const void *units, const void *columns, void *out) {
    using namespace hfkv;
    Matrix matrix = matrix_of(shape, weight, scale, groups, units, columns);
    if (shape[5] == F32) return numbers(matrix, static_cast<float *>(out), shape[6]);
    return numbers(matrix, static_cast<uint16_t *>(out), shape[6]);
}
