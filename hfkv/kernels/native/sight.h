// What queries see of the tokens that are read.

#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace hfkv {

// Which tokens of a tile the queries of one row and kv head see.
class Sight {
  public:
    Sight(const Call &call, int64_t row, int64_t head) : call(call), b(row), h(head) {}

    // Finds which of `count` tokens, of a tile of so many, from index `from` on each query sees; whether any sees any.
    bool look(int64_t from, int64_t count, int64_t tile) {
        const Meta &layout = call.layout;
        if (!call.mask && from >= layout.num_slots()) {
            int64_t begin = layout.held_from() + from - layout.num_slots(), end = begin + count;
            if (end <= layout.pads(b)) return false;
            sees_all = count == tile;
            for (int64_t n = 0; n < call.queries && sees_all; n++) sees_all = is_within(n, begin, end);
            if (sees_all) {
                std::fill_n(is_token_seen, MOST_TILE, true);
                return true;
            }
        }
        sees_all = !call.mask && count == tile;
        std::fill_n(is_token_seen, MOST_TILE, false);
        visible.assign((call.mask && call.mask_strides[1] ? call.rows() : call.queries) * MOST_TILE, 0);
        bool any = false;
        int64_t pads = layout.pads(b);
        bool is_slot = from < layout.num_slots();
        int64_t position = is_slot ? pads + from : layout.held_from() + from - layout.num_slots();
        int64_t looks = int64_t(visible.size()) / MOST_TILE;
        for (int64_t r = 0; r < looks; r++) {
            int64_t n = r % call.queries, t = layout.seen() - call.queries + n;
            int64_t bound = call.bounds ? call.bounds[b * call.bounds_stride + n] : INT64_MIN;
            for (int64_t i = 0; i < count; i++) {
                int64_t j = position + i;
                bool is_seen;
                if (call.mask) {
                    int64_t head = h * call.groups + r / call.queries;
                    int64_t at = b * call.mask_strides[0] + head * call.mask_strides[1] + n * call.mask_strides[2];
                    is_seen = call.mask[at + from + i - layout.first()];
                } else {
                    is_seen = j >= pads && j <= t && (j >= bound || j < pads + layout.sinks());
                    is_seen = is_seen && (!is_slot || j < layout.held_from());
                }
                visible[r * MOST_TILE + i] = is_seen ? -1 : 0;
                is_token_seen[i] |= is_seen;
                any |= is_seen;
                sees_all &= is_seen;
            }
        }
        return any;
    }

    // Which of 16 tokens a query sees, as lanes of ones: of all heads where the mask tells them apart, else of the queries.
    Integers of(int64_t r, int64_t v) const {
        return load<Integers>(&visible[r * MOST_TILE % int64_t(visible.size()) + v * LANES]);
    }

    bool is_token_seen[MOST_TILE], sees_all = false;

  private:
    // Whether a query sees all of the positions `begin .. end - 1`, none of them a slot.
    bool is_within(int64_t n, int64_t begin, int64_t end) const {
        bool is_above = !call.bounds || begin >= call.bounds[b * call.bounds_stride + n];
        return begin >= call.layout.pads(b) && is_above && end <= call.layout.seen() - call.queries + n + 1;
    }

    const Call &call;
    int64_t b, h;
    std::vector<int32_t> visible;
};

}  // namespace hfkv
