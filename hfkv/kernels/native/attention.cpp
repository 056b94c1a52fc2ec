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
        if (call.codec == INT4) rotate(out.data(), call.value_width);
        int64_t at = ((b * call.queries + n) * call.heads * call.groups + head) * call.value_width;
        for (int64_t i = 0; i < call.value_width; i++) store_number(call.out, call.dtype, at + i, out[i]);
        call.lse[(b * call.heads * call.groups + head) * call.queries + n] = sum == 0 ? -INFINITY : largest + std::log(sum);
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

template <int64_t CODEC> void attend(const Call &call) {
    int64_t first = call.layout.first(), last = call.layout.length();
    int64_t stretches = std::max<int64_t>((last - first + STRETCH - 1) / STRETCH, 1);
    int64_t tasks = call.batch * call.heads * stretches;
    std::vector<Part> parts(tasks);
    int64_t threads = std::max<int64_t>(std::min(call.threads, tasks), 1);
    // What takes less than a thread needs to wake up.
    if (call.batch * call.heads * (last - first) * (call.key_width + call.value_width) < 1 << 17) threads = 1;
    std::atomic<bool> has_memory{true};
    share(threads, tasks, [&](int64_t index) {
        int64_t stretch = index % stretches, h = index / stretches % call.heads, b = index / stretches / call.heads;
        int64_t begin = first + stretch * STRETCH;
        try {
            Task<CODEC>(call, b, h).attend(begin, std::min(begin + STRETCH, last), parts[index]);
            if (stretches == 1) finish(call, b, h, &parts[index], 1);
        } catch (const std::bad_alloc &) {
            has_memory = false;
        }
    });
    if (!has_memory) throw std::bad_alloc();
    if (stretches == 1) return;
    for (int64_t index = 0; index < call.batch * call.heads; index++) {
        finish(call, index / call.heads, index % call.heads, &parts[index * stretches], stretches);
    }
}

}  // namespace
}  // namespace hfkv

// Writes the output `[B, q, Hq, Dv]` and its log-sum-exp `[B, Hq, q]`; 1 where the layout is not one of these planes, 2
// where there is no memory for what is summed.
// shape: rows, columns, kv heads, query heads of each, queries, widths of keys and values, codec, dtype of queries,
// capacity of a row or page, threads, strides of the queries (rows, heads, queries), of the mask (the same) and of the
// bounds (rows), pages.
extern "C" int hfkv_attend(const int64_t *shape, const int32_t *meta, const void *query, const void *key_data,
                            const void *key_scales, const void *value_data, const void *value_scales,
                            const int64_t *bounds, const uint8_t *mask, const float *sink_logits, float scale,
                            float softcap, void *out, float *lse) {
    using namespace hfkv;
    Call call;
    std::memcpy(&call.batch, shape, 11 * sizeof(int64_t));
    std::memcpy(call.query_strides, shape + 11, 3 * sizeof(int64_t));
    std::memcpy(call.mask_strides, shape + 14, 3 * sizeof(int64_t));
    call.bounds_stride = shape[17], call.pages = shape[18];
    call.scale = scale, call.softcap = softcap;
    call.layout = Meta{meta, call.batch, call.columns};
    call.query = static_cast<const char *>(query);
    const void *planes[4] = {key_data, key_scales, value_data, value_scales};
    for (int i = 0; i < 4; i++) call.planes[i] = static_cast<const char *>(planes[i]);
    call.bounds = bounds, call.mask = mask, call.sink_logits = sink_logits;
    call.out = static_cast<char *>(out), call.lse = lse;
    if (!lies_in_planes(call)) return 1;
    try {
        switch (call.codec) {
        case NONE_F32: attend<NONE_F32>(call); break;
        case NONE_BF16: attend<NONE_BF16>(call); break;
        case INT8: attend<INT8>(call); break;
        case FP8: attend<FP8>(call); break;
        default: attend<INT4>(call);
        }
    } catch (const std::bad_alloc &) {
        return 2;
    }
    return 0;
}

// Takes the function by which torch's OpenMP begins a region.
extern "C" void hfkv_threads(void *region) { hfkv::region = reinterpret_cast<hfkv::Region>(region); }
