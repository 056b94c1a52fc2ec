"""The attention kernel that decoding and prefill share: query tiles over tiles of encoded keys and values."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton_numbers import cast, rotate, round_tf32, tanh
from hfkv.kernels.triton_tiles import decoded, high_nibbles, load_rows, locate, low_nibbles, tile_ranges

# No position is as large: bounds are cut to it, so that sums of it and an index fit 32 bits.
FAR = tl.constexpr(1 << 30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=[
        "k_scale_b",
        "k_scale_h",
        "v_scale_b",
        "v_scale_h",
        "bounds_b",
        "mask_b",
        "mask_h",
        "mask_n",
        "num_columns",
        "num_queries",
        "num_splits",
    ]
)
def _attention_kernel(
    q_ptr,
    q_b,
    q_h,
    q_n,
    k_ptr,
    k_b,
    k_h,
    k_t,
    k_scale_ptr,
    k_scale_b,
    k_scale_h,
    k_scale_t,
    v_ptr,
    v_b,
    v_h,
    v_t,
    v_scale_ptr,
    v_scale_b,
    v_scale_h,
    v_scale_t,
    meta_ptr,
    num_columns,
    bounds_ptr,
    bounds_b,
    bounds_n,
    mask_ptr,
    mask_b,
    mask_h,
    mask_n,
    mask_t,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    num_queries,
    num_splits,
    scale,
    softcap,
    META: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    K_CODEC: tl.constexpr,
    V_CODEC: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    Q_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_LOG_BLOCK: tl.constexpr,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    V_PRECISION: tl.constexpr,
):
    """One split of the keys for one tile of the rows (query, head of the group) of one kv head and batch row.

    Writes the output `[splits, B, Hq, q, Dv]`, int4 values still rotated, and its log-sum-exp `[splits, B, Hq, q]`.
    """
    split = tl.program_id(0) % num_splits
    # The last queries see most, so they come first.
    row_tile = tl.num_programs(0) // num_splits - 1 - tl.program_id(0) // num_splits
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    start = tl.load(meta_ptr)
    length = tl.load(meta_ptr + 1)
    seen = tl.load(meta_ptr + 4)
    first = tl.load(meta_ptr + 5)
    held_from = tl.load(meta_ptr + 6)
    num_slots = tl.load(meta_ptr + 7)
    sinks = tl.load(meta_ptr + 8)
    pad = tl.load(meta_ptr + META + b)
    spans_ptr = meta_ptr + META + tl.num_programs(2)
    table_ptr = spans_ptr + 3 * num_columns + b * num_columns
    end_slot = length
    if PAGE_SIZE > 0:
        end_slot = tl.load(meta_ptr + 2) * PAGE_SIZE + tl.load(meta_ptr + 3)

    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = r // G
    head = h * G + r % G
    is_row = n < num_queries
    t = seen - num_queries + n
    t_last = seen - num_queries + tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // G, num_queries - 1)
    lowest = pad
    if HAS_BOUNDS:
        bound_at = bounds_ptr + b * bounds_b + n.to(tl.int64) * bounds_n
        bound = tl.minimum(tl.load(bound_at, mask=is_row, other=FAR), FAR).to(tl.int32)
        lowest = tl.maximum(pad, tl.min(bound, 0))
    if HAS_MASK:
        mask_rows = mask_ptr + b * mask_b + head * mask_h + n.to(tl.int64) * mask_n

    d = tl.arange(0, Q_PADDED)
    q_at = q_ptr + b * q_b + (head * q_h + n.to(tl.int64) * q_n)[:, None] + d[None, :]
    q = tl.load(q_at, mask=is_row[:, None] & (d < DK)[None, :], other=0.0).to(K_DTYPE)
    if K_CODEC == "int4":
        # Keys stay rotated, so the query is rotated as well, and cut into the halves that the nibbles hold.
        rotated = rotate(q.to(tl.float32), BLOCK_M, Q_PADDED, K_BLOCK, K_LOG_BLOCK)
        column = tl.arange(0, K_PADDED)
        at_low = tl.broadcast_to(column[None, :], (BLOCK_M, K_PADDED))
        at_high = tl.broadcast_to(tl.minimum(column + K_WIDTH, Q_PADDED - 1)[None, :], (BLOCK_M, K_PADDED))
        q_low = tl.where((column < K_WIDTH)[None, :], tl.gather(rotated, at_low, 1), 0.0)
        q_high = tl.where((column < DK - K_WIDTH)[None, :], tl.gather(rotated, at_high, 1), 0.0)
        q = cast(q_low, K_DTYPE)
        q_high = cast(q_high, K_DTYPE)
        # Of what the products see, so that the rounding of q cancels in q * scale + low.
        q_sum = tl.sum(q.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        highest = tl.where(split == 0, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E, highest)
        total = tl.where(split == 0, 1.0, total)
    acc = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    acc_high = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)

    slots_begin, slots_end, sinks_begin, sinks_end, newest_begin, newest_end = tile_ranges(
        first, length, end_slot, num_slots, held_from, pad, sinks, lowest, t_last, BLOCK_N, HAS_MASK
    )
    in_slots = slots_end - slots_begin
    in_sinks = sinks_end - sinks_begin
    num_tiles = in_slots + in_sinks + newest_end - newest_begin
    per_split = tl.cdiv(num_tiles, num_splits)
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, num_tiles)):
        tile = newest_begin + step - in_slots - in_sinks
        tile = tl.where(step < in_slots + in_sinks, sinks_begin + step - in_slots, tile)
        tile = tl.where(step < in_slots, slots_begin + step, tile)
        index, is_held, block, place = locate(
            tile, b, start, length, end_slot, spans_ptr, table_ptr, num_columns, PAGE_SIZE, BLOCK_N
        )
        is_held = is_held & (index >= first)
        if HAS_MASK:
            mask_at = mask_rows[:, None] + (index - first).to(tl.int64)[None, :] * mask_t
            visible = tl.load(mask_at, mask=is_row[:, None] & is_held[None, :], other=0) != 0
            wanted = tl.max(visible.to(tl.int32), 0) > 0
        else:
            position = tl.where(index < num_slots, pad + index, held_from + index - num_slots)
            is_held = is_held & (position >= pad) & ((index >= num_slots) | (position < held_from))
            visible = is_held[None, :] & (position[None, :] <= t[:, None])
            wanted = is_held & (position <= t_last)
            if HAS_BOUNDS:
                is_sink = position < pad + sinks
                visible = visible & ((position[None, :] >= bound[:, None]) | is_sink[None, :])
                wanted = wanted & ((position >= lowest) | is_sink)

        k = load_rows(k_ptr, block * k_b + h * k_h + place * k_t, wanted, K_WIDTH, K_PADDED)
        k_scale_at = k_scale_ptr + block * k_scale_b + h * k_scale_h + place * k_scale_t
        if K_CODEC == "int4":
            scores = tl.dot(q, tl.trans(low_nibbles(k, K_DTYPE)), input_precision="ieee")
            scores = tl.dot(q_high, tl.trans(high_nibbles(k, K_DTYPE)), scores, input_precision="ieee")
            k_low = tl.load(k_scale_at + 1, mask=wanted, other=0.0).to(tl.float32)
            k_scale = tl.load(k_scale_at, mask=wanted, other=0.0).to(tl.float32)
            scores = scores * k_scale[None, :] + q_sum[:, None] * k_low[None, :]
        else:
            scores = tl.dot(q, tl.trans(decoded(k, K_CODEC, K_DTYPE)), input_precision="ieee")
            if K_CODEC != "none":
                scores = scores * tl.load(k_scale_at, mask=wanted, other=0.0).to(tl.float32)[None, :]
        scores = scores * scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(visible, scores * LOG2_E, float("-inf"))

        before = highest
        highest = tl.maximum(before, tl.max(scores, 1))
        # Of a row that has seen nothing yet both are -inf, whose difference is none.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(before - finite)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]

        v = load_rows(v_ptr, block * v_b + h * v_h + place * v_t, wanted, V_WIDTH, V_PADDED)
        v_scale_at = v_scale_ptr + block * v_scale_b + h * v_scale_h + place * v_scale_t
        if V_CODEC != "none":
            v_scale = tl.load(v_scale_at, mask=wanted, other=1.0).to(tl.float32)
            p = p * v_scale[None, :]
        if V_PRECISION == "tf32":
            p = round_tf32(p)
        p = p.to(V_DTYPE)
        if V_CODEC == "int4":
            acc = tl.dot(p, low_nibbles(v, V_DTYPE), acc, input_precision=V_PRECISION)
            acc_high = acc_high * decay[:, None]
            acc_high = tl.dot(p, high_nibbles(v, V_DTYPE), acc_high, input_precision=V_PRECISION)
            v_low = tl.load(v_scale_at + 1, mask=wanted, other=0.0).to(tl.float32)
            # Of the rounded weights: their rounding then errs by their share of a value, not of its offset.
            offset = offset * decay + tl.sum(p.to(tl.float32) * (v_low / v_scale)[None, :], 1)
        else:
            acc = tl.dot(p, decoded(v, V_CODEC, V_DTYPE), acc, input_precision=V_PRECISION)

    is_empty = total == 0.0
    share = 1.0 / tl.where(is_empty, 1.0, total)
    num_heads = tl.num_programs(1) * G
    out_rows = ((split * tl.num_programs(2) + b) * num_heads + head) * num_queries + n
    d = tl.arange(0, V_PADDED)
    out_at = out_ptr + out_rows[:, None] * DV + d[None, :]
    out = (acc + offset[:, None]) * share[:, None]
    tl.store(out_at, cast(out, out_ptr.dtype.element_ty), mask=is_row[:, None] & (d < V_WIDTH)[None, :])
    if V_CODEC == "int4":
        out = (acc_high + offset[:, None]) * share[:, None]
        valid = is_row[:, None] & (d < DV - V_WIDTH)[None, :]
        tl.store(out_at + V_WIDTH, cast(out, out_ptr.dtype.element_ty), mask=valid)
    lse = tl.where(is_empty, float("-inf"), (highest + tl.log2(tl.where(is_empty, 1.0, total))) * LN_2)
    tl.store(lse_ptr + out_rows, lse, mask=is_row)
