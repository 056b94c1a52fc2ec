"""The attention kernel over latents: query tiles over tiles that are keys and values at once."""

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
        "c_scale_b",
        "r_scale_b",
        "bounds_b",
        "mask_b",
        "mask_h",
        "mask_n",
        "num_columns",
        "num_queries",
        "num_splits",
    ]
)
def _latent_kernel(
    q_ptr,
    q_b,
    q_h,
    q_n,
    c_ptr,
    c_b,
    c_t,
    c_scale_ptr,
    c_scale_b,
    c_scale_t,
    r_ptr,
    r_b,
    r_t,
    r_scale_ptr,
    r_scale_b,
    r_scale_t,
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
    CODEC: tl.constexpr,
    DC: tl.constexpr,
    DR: tl.constexpr,
    C_WIDTH: tl.constexpr,
    R_WIDTH: tl.constexpr,
    C_Q_PADDED: tl.constexpr,
    R_Q_PADDED: tl.constexpr,
    C_PADDED: tl.constexpr,
    R_PADDED: tl.constexpr,
    C_BLOCK: tl.constexpr,
    C_LOG_BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
    R_LOG_BLOCK: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    V_PRECISION: tl.constexpr,
):
    """One split of the latents (c) and rotary keys (r) for one tile of the rows (query, head) of one batch row.

    Writes the output `[splits, B, Hq, q, r]`, of int4 still rotated, and its log-sum-exp `[splits, B, Hq, q]`.
    """
    # Programs side by side read the same tokens, which the first of them brings into L2. The last queries see most, so
    # they come first.
    num_row_tiles = tl.num_programs(0) // num_splits
    split = tl.program_id(0) // num_row_tiles
    row_tile = num_row_tiles - 1 - tl.program_id(0) % num_row_tiles
    b = tl.program_id(2).to(tl.int64)

    start, length, end_slot, seen, first, held_from, num_slots, sinks, pad, spans_ptr, table_ptr = load_rule(
        meta_ptr, b, num_columns, META, PAGE_SIZE
    )

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = row // NUM_HEADS
    head = (row % NUM_HEADS).to(tl.int64)
    is_row = n < num_queries
    t = seen - num_queries + n
    t_last = seen - num_queries + tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // NUM_HEADS, num_queries - 1)
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
        q_ptr, q_rows, is_row, CODEC, DC, C_WIDTH, C_Q_PADDED, C_PADDED, C_BLOCK, C_LOG_BLOCK, BLOCK_M, K_DTYPE
    )
    turned, turned_high, turned_sum = load_query(
        q_ptr + DC, q_rows, is_row, CODEC, DR, R_WIDTH, R_Q_PADDED, R_PADDED, R_BLOCK, R_LOG_BLOCK, BLOCK_M, K_DTYPE
    )

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        highest = tl.where(split == 0, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E, highest)
        total = tl.where(split == 0, 1.0, total)
    acc = tl.zeros([BLOCK_M, C_PADDED], tl.float32)
    acc_high = tl.zeros([BLOCK_M, C_PADDED], tl.float32)
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

        # Loaded once, and a factor of both products.
        c = load_rows(c_ptr, block * c_b + place * c_t, wanted, C_WIDTH, C_PADDED)
        c_scale, c_low = load_scales(c_scale_ptr + block * c_scale_b + place * c_scale_t, wanted, CODEC)
        r = load_rows(r_ptr, block * r_b + place * r_t, wanted, R_WIDTH, R_PADDED)
        r_scale, r_low = load_scales(r_scale_ptr + block * r_scale_b + place * r_scale_t, wanted, CODEC)
        scores = products(q, q_high, q_sum, c, c_scale, c_low, CODEC, K_DTYPE)
        scores += products(turned, turned_high, turned_sum, r, r_scale, r_low, CODEC, K_DTYPE)
        p, decay, highest, total = soft_weights(scores, visible, highest, total, scale, softcap, HAS_SOFTCAP)
        acc, acc_high, offset = add_values(
            acc, acc_high, offset, p, decay, c, c_scale, c_low, CODEC, V_DTYPE, V_PRECISION
        )

    out_rows = ((split * tl.num_programs(2) + b) * NUM_HEADS + head) * num_queries + n
    store_split(out_ptr, lse_ptr, out_rows, is_row, acc, acc_high, offset, highest, total, CODEC, DC, C_WIDTH, C_PADDED)
