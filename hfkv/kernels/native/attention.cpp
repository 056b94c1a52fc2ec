// Attention of few queries to tokens as they are stored: read once, in their own bytes, for all queries of a kv head.
// A task is a stretch of tokens of one row and kv head, of a length that does not depend on the threads: so the sums,
// which are taken in a fixed order, are the same bits however many there are.

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "task.h"
#include "threads.h"

namespace hfkv {
namespace {

constexpr int64_t STRETCH = 4096;
// Of latents there is one head for all queries: more threads find shorter stretches, and tiles of query heads. Each tile
// reads the latents again, so that it has as many rows as that takes little beside the products.
constexpr int64_t LATENT_STRETCH = 1024, LONG = 1 << 15, LATENT_ROWS = 64;

int64_t stretch_of(const Call &call) {
    return call.is_latent() && call.layout.length() <= LONG ? LATENT_STRETCH : STRETCH;
}

// The fewest tiles of all query heads that have so many rows at most, or one head.
int64_t tiles_of(int64_t heads, int64_t queries) {
    int64_t tiles = 1;
    while (tiles < heads && (heads % tiles || heads / tiles * queries > LATENT_ROWS)) tiles++;
    return tiles;
}

// Adds up the stretches of one row and kv head, in their order, and writes the output `[B, q, Hq, Dv]`.
void finish(const Call &call, int64_t b, int64_t h, const Part *parts, int64_t count) {
    int64_t vd = call.padded(call.value_width);
    std::vector<float> out(vd);
    for (int64_t r = 0; r < call.rows(); r++) {
        int64_t head = h * call.groups + r / call.queries, n = r % call.queries;
        float largest = -INFINITY, sum = 0;
        for (int64_t s = 0; s < count; s++) largest = std::max(largest, parts[s].largest[r]);
        if (call.sink_logits) largest = std::max(largest, call.sink_logits[head]);
        std::fill(out.begin(), out.end(), 0.0f);
        for (int64_t s = 0; s < count; s++) {
            bool is_nothing = parts[s].largest[r] == -INFINITY && parts[s].sum[r] == 0;
            if (is_nothing) continue;
            float by = parts[s].largest[r] == largest ? 1.0f : std::exp(parts[s].largest[r] - largest);
            sum += parts[s].sum[r] * by;
            for (int64_t i = 0; i < vd; i++) out[i] += parts[s].out[r * vd + i] * by;
        }
        bool has_logit = call.sink_logits && call.sink_logits[head] != -INFINITY;
        if (has_logit) sum += std::exp(call.sink_logits[head] - largest);
        if (sum != 0) {
            for (int64_t i = 0; i < vd; i++) out[i] /= sum;
        }
        if (is_rotated(call.summed_codec())) rotate(out.data(), call.value_width);
        int64_t at = ((b * call.queries + n) * call.query_heads() + head) * call.value_width;
        for (int64_t i = 0; i < call.value_width; i++) store_number(call.out, call.dtype, at + i, out[i]);
        call.lse[(b * call.query_heads() + head) * call.queries + n] = sum == 0 ? -INFINITY : largest + std::log(sum);
    }
}

// Whether all tokens that the layout names lie in the planes.
bool lies_in_planes(const Call &call) {
    const Meta &layout = call.layout;
    if (layout.first() < 0) return false;
    if (!call.columns) return layout.start() >= 0 && layout.start() + layout.length() <= call.capacity;
    for (int64_t column = 0; column < call.columns && layout.begins(column) < layout.length(); column++) {
        if (layout.low(column) < 0 || layout.high(column) > call.capacity) return false;
        for (int64_t b = 0; b < call.batch; b++) {
            if (layout.page(b, column) < 0 || layout.page(b, column) >= call.pages) return false;
        }
    }
    return true;
}

// Whether there are waves for all places where tokens stand.
bool has_waves(const Call &call) {
    const Mean &mean = call.mean;
    int64_t first = call.layout.first(), last = call.layout.length() - 1;
    for (int64_t b = 0; b < call.batch; b++) {
        for (int64_t i : {first, std::max(first, mean.num_slots()), std::min(mean.num_slots(), last + 1) - 1, last}) {
            if (i < first || i > last) continue;
            int64_t turn = mean.position(b, i) >> 6;
            if (turn <= -mean.turns() || turn >= mean.turns()) return false;
        }
    }
    return true;
}

void attend(const Call &call) {
    int64_t first = call.layout.first(), last = call.layout.length(), stretch = stretch_of(call);
    int64_t stretches = std::max<int64_t>((last - first + stretch - 1) / stretch, 1), heads = call.heads * call.tiles;
    int64_t tasks = call.batch * heads * stretches;
    std::vector<Part> parts(tasks);
    std::vector<std::atomic<int64_t>> done(call.batch * heads);
    int64_t threads = std::max<int64_t>(std::min(call.threads, tasks), 1);
    // What takes less than a thread needs to wake up.
    if (call.batch * call.heads * (last - first) * (call.key_width + call.value_width) < 1 << 17) threads = 1;
    std::atomic<bool> has_memory{true};
    share(threads, tasks, [&](int64_t index) {
        int64_t of = index / stretches, h = of % heads, b = of / heads;
        int64_t begin = first + index % stretches * stretch;
        try {
            Task(call, b, h).attend(begin, std::min(begin + stretch, last), parts[index]);
            // Whoever does the last stretch.
            if (done[of].fetch_add(1, std::memory_order_acq_rel) + 1 == stretches) {
                finish(call, b, h, &parts[of * stretches], stretches);
            }
        } catch (const std::bad_alloc &) {
            has_memory = false;
        }
    });
    if (!has_memory) throw std::bad_alloc();
}

}  // namespace
}  // namespace hfkv

// Writes the output `[B, q, Hq, Dv]` and its log-sum-exp `[B, Hq, q]`; 1 where the layout is not one of these planes, 2
// where there is no memory for what is summed, 3 where tokens stand beyond the waves of the mean that was taken off the keys.
// There is such a mean where there is a vector of it.
// shape: rows, columns, kv heads, query heads of each, queries, widths of keys and values, codec of keys, dtype of queries,
// capacity of a row or page, threads, strides of the queries (rows, heads, queries), of the mask (the same) and of the
// bounds (rows), pages, width of the rotary keys beside latents, codec of values; where there are any rotary keys, keys are
// latents and values too, and what is given as values are rotary keys.
extern "C" int hfkv_attend(const int64_t *shape, const int32_t *meta, const void *query, const void *key_data,
                            const void *key_scales, const void *value_data, const void *value_scales,
                            const int64_t *bounds, const uint8_t *mask, const float *sink_logits,
                            const int64_t *mean_places, const float *mean_tables, const float *mean_vector, float scale,
                            float softcap, void *out, float *lse) {
    using namespace hfkv;
    Call call;
    std::memcpy(&call.batch, shape, 11 * sizeof(int64_t));
    std::memcpy(call.query_strides, shape + 11, 3 * sizeof(int64_t));
    std::memcpy(call.mask_strides, shape + 14, 3 * sizeof(int64_t));
    call.bounds_stride = shape[17], call.pages = shape[18], call.rotary_width = shape[19];
    call.value_codec = shape[20];
    call.scale = scale, call.softcap = softcap;
    call.layout = Meta{meta, call.batch, call.columns};
    call.query = static_cast<const char *>(query);
    const void *planes[6] = {key_data, key_scales, value_data, value_scales, value_data, value_scales};
    if (call.is_latent()) {
        planes[2] = key_data, planes[3] = key_scales;
        call.tiles = tiles_of(call.groups, call.queries), call.groups /= call.tiles;
    }
    for (int i = 0; i < 6; i++) call.planes[i] = static_cast<const char *>(planes[i]);
    call.bounds = bounds, call.mask = mask, call.sink_logits = sink_logits;
    call.mean = Mean{mean_vector, mean_places, mean_tables};
    call.out = static_cast<char *>(out), call.lse = lse;
    if (!lies_in_planes(call)) return 1;
    if (mean_vector && !has_waves(call)) return 3;
    try {
        attend(call);
    } catch (const std::bad_alloc &) {
        return 2;
    }
    return 0;
}

// The float32 numbers of a vector: with fewer than 16 larger products are torch's.
extern "C" int hfkv_lanes() { return int(hfkv::NATIVE); }

// Takes the function by which torch's OpenMP begins a region.
extern "C" void hfkv_threads(void *region) { hfkv::region = reinterpret_cast<hfkv::Region>(region); }
