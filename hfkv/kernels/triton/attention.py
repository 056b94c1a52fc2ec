"""The attention kernel that decoding and prefill share: query tiles over tiles of encoded keys and values."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.mean.scores import (
    MANY_ROWS,
    add_mean,
    load_factors,
    load_places,
    places_inside,
    turned,
    waves_at,
    waves_inside,
)
from hfkv.kernels.triton.merge import merge_last
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
    k_d,
    k_scale_ptr,
    k_scale_b,
    k_scale_h,
    k_scale_t,
    v_ptr,
    v_b,
    v_h,
    v_t,
    v_d,
    v_scale_ptr,
    v_scale_b,
    v_scale_h,
    v_scale_t,
    pairs_ptr,
    mean_ptr,
    waves_ptr,
    turns_ptr,
    places_ptr,
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
    merged_ptr,
    merged_lse_ptr,
    counters_ptr,
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
    ROTATION: tl.constexpr,
    LOG_ROTATION: tl.constexpr,
    M_PADDED: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    FEW: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
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
    """Attends from one tile of rows (query, head of the group), of one kv head and batch row, to one split of its keys.

    Writes the output `[splits, B, Hq, q, Dv]`, rotated as the values are, and its log-sum-exp `[splits, B, Hq, q]`;
    with MERGED_SPLITS, how many are merged at a time, the last program of these rows merges them.
    """
    split = tl.program_id(0) % num_splits
    # The last queries see most, so they come first.
    row_tile = tl.num_programs(0) // num_splits - 1 - tl.program_id(0) // num_splits
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    rule = load_rule(meta_ptr, b, num_columns, META, IS_RAGGED)
    layout = load_layout(meta_ptr, b, num_columns, META, PAGE_SIZE, IS_RAGGED)

    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = r // G
    head = h * G + r % G
    is_row = n < num_queries
    limits = load_limits(
        *(row_tile, n, is_row, num_queries, b, head, rule),
        *(bounds_ptr, bounds_b, bounds_n, mask_ptr, mask_b, mask_h, mask_n, mask_t),
        *(G, BLOCK_M, HAS_BOUNDS, HAS_MASK),
    )

    q_rows = b * q_b + head * q_h + n.to(tl.int64) * q_n
    q = load_query(
        q_ptr, q_rows, is_row, K_CODEC, DK, K_WIDTH, Q_PADDED, K_PADDED, K_BLOCK, K_LOG_BLOCK, BLOCK_M, K_DTYPE
    )

    highest, total = empty_softmax(sinks_ptr, head, split, BLOCK_M, HAS_SINKS)
    acc, acc_high, offset = empty_sums(BLOCK_M, V_PADDED)

    pairs = load_pairs(pairs_ptr, K_CODEC, V_CODEC)
    ranges, first_step, last_step = tiles_of_split(split, num_splits, layout, rule, limits, BLOCK_N, HAS_MASK)
    run = load_run(meta_ptr, layout, num_columns, PAGE_SIZE, BLOCK_N)
    of_inside = rule
    if HAS_MEAN:
        places, of_inside = load_places(places_ptr, b, rule)
        factors = load_factors(
            *(q_ptr, q_rows, is_row, 1.0, mean_ptr, h, DK, Q_PADDED, PAIRS, PAIRS_PADDED, IS_INTERLEAVED)
        )
        ahead = places_inside(run, places)
        IS_TURNED: tl.constexpr = BLOCK_M < MANY_ROWS  # noqa: N806
    inside, behind = steps_inside(first_step, last_step, ranges, run, layout, of_inside, limits, BLOCK_N, HAS_MASK)
    # Edges are few, except under a mask: one tile on its way is enough, and takes fewer registers.
    EDGE_STAGES: tl.constexpr = 1 if HAS_MEAN else None if HAS_MASK else 2  # noqa: N806
    for edge in tl.range(first_step, last_step - behind + inside, num_stages=EDGE_STAGES):
        block, place, visible, wanted, index = visit_tile(
            *(edge_at(edge, inside, behind), ranges, b, layout, num_columns, rule, limits),
            *(PAGE_SIZE, BLOCK_N, HAS_BOUNDS, HAS_MASK),
        )

        k_at = k_ptr + (block * k_b + h * k_h + place * k_t)
        k_scale_at = k_scale_ptr + (block * k_scale_b + h * k_scale_h + place * k_scale_t)
        k = load_tokens(k_at, k_d, k_scale_at, wanted, pairs, K_CODEC, K_WIDTH, K_PADDED, True)
        scores = products(q, k, K_CODEC, K_DTYPE)
        if HAS_MEAN:
            here = waves_at(waves_ptr, index, wanted, places, PAIRS_PADDED)
            scores = add_mean(scores, factors[0], factors[1], here, factors)
        p, decay, highest, total = soft_weights(scores, visible, highest, total, scale, softcap, HAS_SOFTCAP, True)

        v_at = v_ptr + (block * v_b + h * v_h + place * v_t)
        v_scale_at = v_scale_ptr + (block * v_scale_b + h * v_scale_h + place * v_scale_t)
        v = load_tokens(v_at, v_d, v_scale_at, wanted, pairs, V_CODEC, V_WIDTH, V_PADDED, True)
        acc, acc_high, offset = add_values(acc, acc_high, offset, p, decay, v, V_CODEC, V_DTYPE, V_PRECISION)

    if HAS_MEAN and IS_TURNED:
        waves = waves_inside(waves_ptr, 0, ranges, ahead, BLOCK_N, PAIRS_PADDED, True)
    for step in tl.range(inside, behind):
        block, place, more = locate_inside(step, ranges, b, layout, PAGE_SIZE, BLOCK_N)

        k_at = k_ptr + (block * k_b + h * k_h + place * k_t) + more * k_t
        k_scale_at = k_scale_ptr + (block * k_scale_b + h * k_scale_h + place * k_scale_t) + more * k_scale_t
        k = load_tokens(k_at, k_d, k_scale_at, 0, pairs, K_CODEC, K_WIDTH, K_PADDED, False)
        scores = products(q, k, K_CODEC, K_DTYPE)
        if HAS_MEAN:
            if IS_TURNED:
                c, s = turned(factors, turns_ptr, step, ranges, ahead, BLOCK_N, PAIRS_PADDED)
                scores = add_mean(scores, c, s, waves, factors)
            else:
                here = waves_inside(waves_ptr, step, ranges, ahead, BLOCK_N, PAIRS_PADDED, False)
                scores = add_mean(scores, factors[0], factors[1], here, factors)
        p, decay, highest, total = soft_weights(scores, 0, highest, total, scale, softcap, HAS_SOFTCAP, False)

        v_at = v_ptr + (block * v_b + h * v_h + place * v_t) + more * v_t
        v_scale_at = v_scale_ptr + (block * v_scale_b + h * v_scale_h + place * v_scale_t) + more * v_scale_t
        v = load_tokens(v_at, v_d, v_scale_at, 0, pairs, V_CODEC, V_WIDTH, V_PADDED, False)
        acc, acc_high, offset = add_values(acc, acc_high, offset, p, decay, v, V_CODEC, V_DTYPE, V_PRECISION)

    num_heads = tl.num_programs(1) * G
    rows = (b * num_heads + head) * num_queries + n
    num_rows = tl.num_programs(2).to(tl.int64) * num_heads * num_queries
    out_rows = split * num_rows + rows
    store_split(
        out_ptr, lse_ptr, out_rows, is_row, acc, acc_high, offset, highest, total, V_CODEC, DV, V_WIDTH, V_PADDED
    )
    if MERGED_SPLITS > 0:
        program = ((b * tl.num_programs(1) + h) * (tl.num_programs(0) // num_splits) + row_tile).to(tl.int32)
        merge_last(
            *((merged_ptr, merged_lse_ptr, counters_ptr), out_ptr, lse_ptr, program, rows, is_row, num_rows),
            *(num_splits, DV, M_PADDED, ROTATION, LOG_ROTATION, BLOCK_M, MERGED_SPLITS, FEW),
        )
