// New tokens, encoded to the bits that the torch codecs write, and put where a cache keeps them.
// Compiled without contraction of products and sums: a fused one is rounded once, and torch's operations twice.

#include <algorithm>
#include <vector>

#include "common.h"
#include "levels.h"
#include "log_scale.h"
#include "threads.h"
#include "trellis.h"
#include "vectors.h"

namespace hfkv {
namespace {

#if defined(__clang__)
#define SHUFFLED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLED(x, ...) __builtin_shuffle(x, Integers{__VA_ARGS__})
#endif

// The numbers as they are swapped with partners 1, 2, 4 or 8 places away.
inline Vector swapped_1(Vector x) { return SHUFFLED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
inline Vector swapped_2(Vector x) { return SHUFFLED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
inline Vector swapped_4(Vector x) { return SHUFFLED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline Vector swapped_8(Vector x) { return SHUFFLED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }

inline Vector at_most(Vector x, float limit) { return select(x > limit, Vector{} + limit, x); }
inline Vector at_least(Vector x, float limit) { return select(x < limit, Vector{} + limit, x); }

// Whole numbers of numbers below 2 ** 22, half to even; NaN is 0.
inline Integers whole(Vector x) {
    x = select(x == x, x, Vector{});
    return __builtin_convertvector((x + 12582912.0f) - 12582912.0f, Integers);
}

// Up to 16 codes, from the lowest bytes of as many numbers.
inline void store_codes(uint8_t *at, Integers x, int64_t count) {
    Codes codes = __builtin_convertvector(x & 0xFF, Codes);
    if (count < LANES) {
        std::memcpy(at, &codes, count);
    } else {
        std::memcpy(at, &codes, LANES);
    }
}

// See `hfkv.codecs.base.scale_for`: rounded before anything is divided by it.
uint16_t scale_for(float largest, float inverse) {
    uint16_t scale = to_bf16(largest * inverse);
    return (scale & 0x7FFF) == 0 ? 0x3F80 : scale;
}

// The least and the most of a row, both NaN where one number is. Rows are followed by copies of their first number, up
// to a multiple of LANES.
void range_of(const float *x, int64_t width, float *least, float *most) {
    Vector low = load<Vector>(x), high = low;
    Integers odd = low != low;
    for (int64_t i = LANES; i < width; i += LANES) {
        Vector numbers = load<Vector>(x + i);
        odd |= numbers != numbers;
        low = select(numbers < low, numbers, low);
        high = select(numbers > high, numbers, high);
    }
    Vector nans = (Vector)odd;
    auto fold = [&](auto swapped) {
        Vector others = swapped(low);
        low = select(others < low, others, low);
        others = swapped(high);
        high = select(others > high, others, high);
        nans = (Vector)((Integers)nans | (Integers)swapped(nans));
    };
    fold(swapped_8), fold(swapped_4), fold(swapped_2), fold(swapped_1);
    bool has_nan = ((Integers)nans)[0] != 0;
    *least = has_nan ? NAN : low[0];
    *most = has_nan ? NAN : high[0];
}

float largest_of(const float *x, int64_t width) {
    float least, most;
    range_of(x, width, &least, &most);
    return -least > most ? -least : std::fabs(most);
}

// As torch casts to float8_e4m3fn.
uint8_t to_fp8(float x) {
    uint32_t bits = bits_of(x), sign = bits & 0x80000000u, result;
    bits ^= sign;
    if (bits >= (1087u << 20)) {
        result = 0x7F;
    } else if (bits < (121u << 23)) {
        result = bits_of(from_bits(bits) + from_bits(141u << 23)) - (141u << 23);
    } else {
        bits += (uint32_t(7 - 127) << 23) + 0x7FFFF + ((bits >> 20) & 1);
        result = bits >> 20;
    }
    return uint8_t(result | (sign >> 24));
}

void encode_int8(const float *x, int64_t width, uint8_t *codes, uint16_t *scale) {
    *scale = scale_for(largest_of(x, width), float(1.0 / 127));
    float by = from_bf16(*scale);
    for (int64_t i = 0; i < width; i += LANES) {
        store_codes(codes + i, whole(at_least(at_most(load<Vector>(x + i) / by, 127), -127)), width - i);
    }
}

void encode_fp8(const float *x, int64_t width, uint8_t *codes, uint16_t *scale) {
    *scale = scale_for(largest_of(x, width), float(1.0 / 448));
    float by = from_bf16(*scale);
    for (int64_t i = 0; i < width; i++) {
        float q = x[i] / by;
        codes[i] = to_fp8(q > 448 ? 448 : q < -448 ? -448 : q);
    }
}

// Adds to each number its partner, and takes it from its partner where `signs` says so.
inline Vector butterfly(Vector x, Vector partners, Integers signs) { return partners + (Vector)((Integers)x ^ signs); }

// `rotate` of common.h to the bit: the same sums in the same order, 16 at once.
void rotate_row(float *row, int64_t width) {
    int64_t block = width & -width;
    if (block < LANES) return rotate(row, width);
    constexpr int32_t N = INT32_MIN;
    for (int64_t i = 0; i < width; i += LANES) {
        Vector x = load<Vector>(row + i);
        x = butterfly(x, swapped_1(x), Integers{0, N, 0, N, 0, N, 0, N, 0, N, 0, N, 0, N, 0, N});
        x = butterfly(x, swapped_2(x), Integers{0, 0, N, N, 0, 0, N, N, 0, 0, N, N, 0, 0, N, N});
        x = butterfly(x, swapped_4(x), Integers{0, 0, 0, 0, N, N, N, N, 0, 0, 0, 0, N, N, N, N});
        x = butterfly(x, swapped_8(x), Integers{0, 0, 0, 0, 0, 0, 0, 0, N, N, N, N, N, N, N, N});
        store(row + i, x);
    }
    for (int64_t half = LANES; half < block; half *= 2) {
        for (int64_t i = 0; i < width; i += 2 * half) {
            for (int64_t j = i; j < i + half; j += LANES) {
                Vector a = load<Vector>(row + j), b = load<Vector>(row + j + half);
                store(row + j, a + b);
                store(row + j + half, a - b);
            }
        }
    }
    float scale = float(1.0 / std::sqrt(double(block)));
    for (int64_t i = 0; i < width; i += LANES) store(row + i, load<Vector>(row + i) * scale);
}

// Numbers behind the row's last one are written over.
void encode_int4(float *x, int64_t width, uint8_t *codes, uint16_t *scale_and_low) {
    rotate_row(x, width);
    for (int64_t i = width; i % LANES; i++) x[i] = x[0];
    float least, most;
    range_of(x, width, &least, &most);
    uint16_t low = to_bf16(least + 0.0f);  // of 0.0 and -0.0 no order says which is the least
    float origin = from_bf16(low);
    scale_and_low[0] = scale_for(most - origin, float(1.0 / 15));
    scale_and_low[1] = low;
    float by = from_bf16(scale_and_low[0]);
    int64_t half = (width + 1) / 2;
    auto code = [&](int64_t i) { return whole(at_least(at_most((load<Vector>(x + i) - origin) / by, 15), 0)); };
    if (width % 2) x[width] = origin;  // which is code 0
    for (int64_t i = 0; i < half; i += LANES) store_codes(codes + i, code(i) | code(half + i) << 4, half - i);
}

// What is worked out of a row, whose numbers go on up to a multiple of LANES.
struct Scratch {
    explicit Scratch(int64_t widest) : row(widest + 2 * LANES), levels(widest), doubled(widest + LANES) {}

    std::vector<float> row;
    LevelScratch levels;
    std::vector<int32_t> doubled;
    std::vector<uint8_t> paths;
};

uint8_t encode_int3(int64_t width, uint8_t *codes, Scratch &of) {
    rotate_row(of.row.data(), width);
    return write_levels(of.row.data(), width, codes, of.levels);
}

// See `hfkv.codecs.int2`.
uint8_t encode_int2(int64_t width, uint8_t *codes, Scratch &of) {
    rotate_row(of.row.data(), width);
    float squares = squares_of(of.row.data(), width, of.levels.squares.data());
    uint8_t middle = scale_of_row(squares, width, TRELLIS_DEVIATION);
    if (!has_numbers(middle)) {
        std::fill_n(codes, bytes_of_string(width), uint8_t(0));
        return middle;
    }
    float half = from_log_scale(middle) * 0.5f;
    for (int64_t i = 0; i < width; i += LANES) {
        Integers doubled = whole(load<Vector>(&of.row[i]) / half);
        std::memcpy(&of.doubled[i], &doubled, sizeof(doubled));
    }
    StringSums sums = write_string(of.doubled.data(), width, codes, of.paths);
    return best_scale(squares, float(sums.products) * half, float(sums.squares)).byte;
}

// New tokens of keys or values, and the planes they go to.
struct Part {
    const char *tokens;                 // [B, H, n, D]
    int64_t strides[3];  // in numbers; the last dimension lies together
    int64_t codec, width, heads;
    char *data, *scales;
};

int64_t row_bytes(int64_t codec, int64_t width, int64_t size) {
    if (codec == NONE_F32 || codec == NONE_BF16) return width * size;
    if (codec == INT3) return bytes_of_levels(width);
    if (codec == INT2) return bytes_of_string(width);
    return codec == INT4 ? (width + 1) / 2 : width;
}

void append_row(const Part &part, int64_t dtype, int64_t b, int64_t h, int64_t n, int64_t slot, Scratch &of) {
    float *row = of.row.data();
    int64_t codec = part.codec, width = part.width, size = dtype == F32 ? 4 : 2;
    const char *tokens = part.tokens + size * (b * part.strides[0] + h * part.strides[1] + n * part.strides[2]);
    if (codec == NONE_F32 || codec == NONE_BF16) {
        std::memcpy(part.data + slot * width * size, tokens, width * size);
        return;
    }
    if (dtype == F32) {
        std::memcpy(row, tokens, 4 * width);
    } else if (dtype == BF16) {
        const uint16_t *halves = reinterpret_cast<const uint16_t *>(tokens);
        for (int64_t i = 0; i < width; i++) row[i] = from_bf16(halves[i]);
    } else {
        for (int64_t i = 0; i < width; i++) row[i] = load_number(tokens, dtype, i);
    }
    for (int64_t i = width; i % LANES; i++) row[i] = row[0];
    uint8_t *codes = reinterpret_cast<uint8_t *>(part.data) + slot * row_bytes(codec, width, size);
    uint16_t *scales = reinterpret_cast<uint16_t *>(part.scales);
    if (codec == INT8) {
        encode_int8(row, width, codes, scales + slot);
    } else if (codec == FP8) {
        encode_fp8(row, width, codes, scales + slot);
    } else if (codec == INT4) {
        encode_int4(row, width, codes, scales + 2 * slot);
    } else {
        part.scales[slot] = char(codec == INT3 ? encode_int3(width, codes, of) : encode_int2(width, codes, of));
    }
}

// Moves the first tokens of a row and head, which lie `gap` slots before `slot`, to where they are to be.
void move_front(const Part &part, int64_t dtype, int64_t slot, int64_t front, int64_t gap) {
    int64_t bytes = row_bytes(part.codec, part.width, dtype == F32 ? 4 : 2);
    std::memmove(part.data + slot * bytes, part.data + (slot - gap) * bytes, front * bytes);
    if (!part.scales) return;
    int64_t of_scales = scale_bytes(part.codec);
    std::memmove(part.scales + slot * of_scales, part.scales + (slot - gap) * of_scales, front * of_scales);
}

}  // namespace
}  // namespace hfkv

// Writes new tokens of all rows and heads behind those that are held; 1 where there is no room for them.
// shape: rows, rows and columns that the layout says something of, new tokens, their dtype, capacity of a row or page,
// pages, threads; then for keys and values each: codec, heads, width, and strides of rows, heads and tokens; then how
// many tokens at the front move before, to where the layout says, and by how many slots.
extern "C" int hfkv_append(const int64_t *shape, const int32_t *meta, const void *keys, const void *values,
                           void *key_data, void *key_scales, void *value_data, void *value_scales) {
    using namespace hfkv;
    int64_t batch = shape[0], columns = shape[2], count = shape[3], dtype = shape[4], capacity = shape[5];
    int64_t pages = shape[6], threads = shape[7];
    Meta layout{meta, shape[1], columns};
    auto part_of = [&](const void *tokens, const int64_t *given, void *data, void *scales) {
        return Part{static_cast<const char *>(tokens), {given[3], given[4], given[5]}, given[0], given[2], given[1],
                    static_cast<char *>(data), static_cast<char *>(scales)};
    };
    Part parts[2] = {part_of(keys, shape + 8, key_data, key_scales),
                     part_of(values, shape + 14, value_data, value_scales)};
    int64_t behind = layout.last_column() * capacity + layout.last_slot();
    if (columns) {
        if (behind + count > columns * capacity) return 1;
        for (int64_t column = behind / capacity; column <= (behind + count - 1) / capacity; column++) {
            for (int64_t b = 0; b < batch; b++) {
                if (layout.page(b, column) < 0 || layout.page(b, column) >= pages) return 1;
            }
        }
    } else if (layout.start() < 0 || layout.start() + layout.length() + count > capacity) {
        return 1;
    }
    int64_t front = shape[20], gap = shape[21];
    if (front) {
        if (columns || front > layout.length() || gap < 0 || gap > layout.start()) return 1;
        for (const Part &part : parts) {
            for (int64_t row = 0; row < batch * part.heads; row++) {
                move_front(part, dtype, row * capacity + layout.start(), front, gap);
            }
        }
    }
    int64_t rows_of_keys = batch * parts[0].heads * count, rows = rows_of_keys + batch * parts[1].heads * count;
    int64_t widest = parts[0].width > parts[1].width ? parts[0].width : parts[1].width;
    // A few rows are done before another thread has woken up.
    if (rows * widest < 1 << 14) threads = 1;
    // Some tasks a thread: one that comes late has the others do more.
    int64_t tasks = threads > 1 ? std::min(rows, 8 * threads) : 1;
    share(threads, tasks, [&](int64_t task) {
        Scratch scratch(widest);  // a few hundred numbers
        for (int64_t index = task * rows / tasks; index < (task + 1) * rows / tasks; index++) {
            const Part &part = parts[index >= rows_of_keys];
            int64_t of_part = index >= rows_of_keys ? index - rows_of_keys : index;
            int64_t n = of_part % count, h = of_part / count % part.heads, b = of_part / count / part.heads;
            int64_t slot = (b * part.heads + h) * capacity + layout.start() + layout.length() + n;
            if (columns) {
                int64_t at = behind + n;
                slot = (layout.page(b, at / capacity) * part.heads + h) * capacity + at % capacity;
            }
            append_row(part, dtype, b, h, n, slot, scratch);
        }
    });
    return 0;
}
