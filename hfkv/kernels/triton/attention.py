"""The attention kernel that decoding and prefill share: query tiles over tiles of encoded keys and values."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.products import (
    LOG2_E,
    add_values,
    load_query,
    load_scales,
    products,
    soft_weights,
    store_split,
)
from hfkv.kernels.triton.tiles import FAR, load_rows, load_rule, locate, seen_in, tile_at, tile_ranges


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

    start, length, end_slot, seen, first, held_from, num_slots, sinks, pad, spans_ptr, table_ptr = load_rule(
        meta_ptr, b, num_columns, META, PAGE_SIZE
    )

    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = r // G
    head = h * G + r % G
    is_row = n < num_queries
    t = seen - num_queries + n
    t_last = seen - num_queries + tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // G, num_queries - 1)
    lowest = pad
    bound = None
    mask_rows = None
    if HAS_BOUNDS:
        bound_at = bounds_ptr + b * bounds_b + n.to(tl.int64) * bounds_n
        bound = tl.minimum(tl.load(bound_at, mask=is_row, other=FAR), FAR).to(tl.int32)
        lowest = tl.maximum(pad, tl.min(bound, 0))
    if HAS_MASK:
        mask_rows = mask_ptr + b * mask_b + head * mask_h + n.to(tl.int64) * mask_n

    q_rows = b * q_b + head * q_h + n.to(tl.int64) * q_n
    q, q_high, q_sum = load_query(
        q_ptr, q_rows, is_row, K_CODEC, DK, K_WIDTH, Q_PADDED, K_PADDED, K_BLOCK, K_LOG_BLOCK, BLOCK_M, K_DTYPE
    )

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
        tile = tile_at(step, slots_begin, in_slots, sinks_begin, in_sinks, newest_begin)
        index, is_held, block, place = locate(
            tile, b, start, length, end_slot, spans_ptr, table_ptr, num_columns, PAGE_SIZE, BLOCK_N
        )
        visible, wanted = seen_in(
            index,
            is_held,
            is_row,
            t,
            t_last,
            bound,
            lowest,
            mask_rows,
            mask_t,
            first,
            held_from,
            num_slots,
            sinks,
            pad,
            HAS_BOUNDS,
            HAS_MASK,
        )

        k = load_rows(k_ptr, block * k_b + h * k_h + place * k_t, wanted, K_WIDTH, K_PADDED)
        k_scale_at = k_scale_ptr + block * k_scale_b + h * k_scale_h + place * k_scale_t
        k_scale, k_low = load_scales(k_scale_at, wanted, K_CODEC)
        scores = products(q, q_high, q_sum, k, k_scale, k_low, K_CODEC, K_DTYPE)
        p, decay, highest, total = soft_weights(scores, visible, highest, total, scale, softcap, HAS_SOFTCAP)

        v = load_rows(v_ptr, block * v_b + h * v_h + place * v_t, wanted, V_WIDTH, V_PADDED)
        v_scale_at = v_scale_ptr + block * v_scale_b + h * v_scale_h + place * v_scale_t
        v_scale, v_low = load_scales(v_scale_at, wanted, V_CODEC)
        acc, acc_high, offset = add_values(
            acc, acc_high, offset, p, decay, v, v_scale, v_low, V_CODEC, V_DTYPE, V_PRECISION
        )

    num_heads = tl.num_programs(1) * G
    out_rows = ((split * tl.num_programs(2) + b) * num_heads + head) * num_queries + n
    store_split(
        out_ptr, lse_ptr, out_rows, is_row, acc, acc_high, offset, highest, total, V_CODEC, DV, V_WIDTH, V_PADDED
    )
