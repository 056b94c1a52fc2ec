"""The attention kernel over latents: query tiles over tiles that are keys and values at once."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.products import (
    add_values,
    empty_softmax,
    empty_sums,
    load_query,
    products,
    soft_weights,
    store_split,
)
from hfkv.kernels.triton.tiles import (
    edge_at,
    load_layout,
    load_run,
    locate_inside,
    steps_inside,
    tiles_of_split,
    visit_tile,
)
from hfkv.kernels.triton.tokens import load_pairs, load_tokens
from hfkv.kernels.triton.visibility import load_limits, load_rule


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
    c_d,
    c_scale_ptr,
    c_scale_b,
    c_scale_t,
    r_ptr,
    r_b,
    r_t,
    r_d,
    r_scale_ptr,
    r_scale_b,
    r_scale_t,
    pairs_ptr,
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
    IS_RAGGED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    C_CODEC: tl.constexpr,
    R_CODEC: tl.constexpr,
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
    """Attends from one tile of rows (query, head) of one batch row to one split of its latents (c) and rotary keys (r).

    Writes the output `[splits, B, Hq, q, r]`, rotated as the values are, and its log-sum-exp `[splits, B, Hq, q]`.
    """
    # Programs side by side read the same tokens, which the first of them brings into L2. The last queries see most, so
    # they come first.
    num_row_tiles = tl.num_programs(0) // num_splits
    split = tl.program_id(0) // num_row_tiles
    row_tile = num_row_tiles - 1 - tl.program_id(0) % num_row_tiles
    b = tl.program_id(2).to(tl.int64)

    rule = load_rule(meta_ptr, b, num_columns, META, IS_RAGGED)
    layout = load_layout(meta_ptr, b, num_columns, META, PAGE_SIZE, IS_RAGGED)

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = row // NUM_HEADS
    head = (row % NUM_HEADS).to(tl.int64)
    is_row = n < num_queries
    limits = load_limits(
        *(row_tile, n, is_row, num_queries, b, head, rule),
        *(bounds_ptr, bounds_b, bounds_n, mask_ptr, mask_b, mask_h, mask_n, mask_t),
        *(NUM_HEADS, BLOCK_M, HAS_BOUNDS, HAS_MASK),
    )

    q_rows = b * q_b + head * q_h + n.to(tl.int64) * q_n
    q = load_query(
        q_ptr, q_rows, is_row, C_CODEC, DC, C_WIDTH, C_Q_PADDED, C_PADDED, C_BLOCK, C_LOG_BLOCK, BLOCK_M, K_DTYPE
    )
    turned = load_query(
        q_ptr + DC, q_rows, is_row, R_CODEC, DR, R_WIDTH, R_Q_PADDED, R_PADDED, R_BLOCK, R_LOG_BLOCK, BLOCK_M, K_DTYPE
    )

    highest, total = empty_softmax(sinks_ptr, head, split, BLOCK_M, HAS_SINKS)
    acc, acc_high, offset = empty_sums(BLOCK_M, C_PADDED)

    pairs = load_pairs(pairs_ptr, C_CODEC, R_CODEC)
    ranges, first_step, last_step = tiles_of_split(split, num_splits, layout, rule, limits, BLOCK_N, HAS_MASK)
    run = load_run(meta_ptr, layout, num_columns, PAGE_SIZE, BLOCK_N)
    inside, behind = steps_inside(first_step, last_step, ranges, run, layout, rule, limits, BLOCK_N, HAS_MASK)
    # Tiles at an edge are few: no more than one is on its way, in registers that the others would have to share.
    for edge in tl.range(first_step, last_step - behind + inside, num_stages=2):
        block, place, visible, wanted, _ = visit_tile(
            *(edge_at(edge, inside, behind), ranges, b, layout, num_columns, rule, limits),
            *(PAGE_SIZE, BLOCK_N, HAS_BOUNDS, HAS_MASK),
        )

        # Loaded once, and a factor of both products.
        c_at = c_ptr + (block * c_b + place * c_t)
        c_scale_at = c_scale_ptr + (block * c_scale_b + place * c_scale_t)
        c = load_tokens(c_at, c_d, c_scale_at, wanted, pairs, C_CODEC, C_WIDTH, C_PADDED, True)
        r_at = r_ptr + (block * r_b + place * r_t)
        r_scale_at = r_scale_ptr + (block * r_scale_b + place * r_scale_t)
        r = load_tokens(r_at, r_d, r_scale_at, wanted, pairs, R_CODEC, R_WIDTH, R_PADDED, True)
        scores = products(q, c, C_CODEC, K_DTYPE)
        scores += products(turned, r, R_CODEC, K_DTYPE)
        p, decay, highest, total = soft_weights(scores, visible, highest, total, scale, softcap, HAS_SOFTCAP, True)
        acc, acc_high, offset = add_values(acc, acc_high, offset, p, decay, c, C_CODEC, V_DTYPE, V_PRECISION)

    for step in tl.range(inside, behind):
        block, place, more = locate_inside(step, ranges, b, layout, PAGE_SIZE, BLOCK_N)

        c_at = c_ptr + (block * c_b + place * c_t) + more * c_t
        c_scale_at = c_scale_ptr + (block * c_scale_b + place * c_scale_t) + more * c_scale_t
        c = load_tokens(c_at, c_d, c_scale_at, 0, pairs, C_CODEC, C_WIDTH, C_PADDED, False)
        r_at = r_ptr + (block * r_b + place * r_t) + more * r_t
        r_scale_at = r_scale_ptr + (block * r_scale_b + place * r_scale_t) + more * r_scale_t
        r = load_tokens(r_at, r_d, r_scale_at, 0, pairs, R_CODEC, R_WIDTH, R_PADDED, False)
        scores = products(q, c, C_CODEC, K_DTYPE)
        scores += products(turned, r, R_CODEC, K_DTYPE)
        p, decay, highest, total = soft_weights(scores, 0, highest, total, scale, softcap, HAS_SOFTCAP, False)
        acc, acc_high, offset = add_values(acc, acc_high, offset, p, decay, c, C_CODEC, V_DTYPE, V_PRECISION)

    out_rows = ((split * tl.num_programs(2) + b) * NUM_HEADS + head) * num_queries + n
    store_split(
        out_ptr, lse_ptr, out_rows, is_row, acc, acc_high, offset, highest, total, C_CODEC, DC, C_WIDTH, C_PADDED
    )
