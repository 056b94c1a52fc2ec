"""The attention kernel of a few queries over codes of which those of values lie transposed, in products of digits."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.bits.parts import parts_of
from hfkv.kernels.triton.digits.mean import add_mean, in_digits
from hfkv.kernels.triton.digits.numbers import NUMBERS, load_query_digits, number_of_row
from hfkv.kernels.triton.digits.products import (
    add_values,
    capped,
    empty_softmax,
    empty_sums,
    exponent_factor,
    load_scales,
    loaded_together,
    query_factor,
    scores_of,
    soft_weights,
    store_split,
)
from hfkv.kernels.triton.mean.scores import (
    load_factors,
    load_places,
    places_inside,
    turned,
    waves_at,
    waves_inside,
)
from hfkv.kernels.triton.merge import merge_last
from hfkv.kernels.triton.tiles import (
    edge_at,
    in_planes,
    load_layout,
    load_run,
    locate_inside,
    steps_inside,
    tiles_of_split,
    visit_tile,
)
from hfkv.kernels.triton.tokens import load_codes, load_pairs
from hfkv.kernels.triton.visibility import load_limits, load_rule


@triton.jit(
    do_not_specialize=[
        "bounds_b",
        "mask_b",
        "mask_h",
        "mask_n",
        "num_columns",
        "num_queries",
        "num_splits",
    ]
)
def _digits_kernel(
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
    v_ptr,
    v_b,
    v_h,
    v_d,
    v_scale_ptr,
    v_scale_b,
    v_scale_h,
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
    IS_ASSEMBLY: tl.constexpr,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attends from one tile of rows (query, head of the group), of one kv head and batch row, to one split of its keys.

    Writes the output `[splits, B, Hq, q, Dv]`, rotated as the values are, and its log-sum-exp `[splits, B, Hq, q]`;
    with MERGED_SPLITS, how many are merged at a time, the last program of these rows merges them.
    """
    TILES: tl.constexpr = BLOCK_M // NUMBERS  # noqa: N806
    split = tl.program_id(0) % num_splits
    # The last queries see most, so they come first.
    row_tile = tl.num_programs(0) // num_splits - 1 - tl.program_id(0) // num_splits
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    rule = load_rule(meta_ptr, b, num_columns, META, IS_RAGGED)
    layout = load_layout(meta_ptr, b, num_columns, META, PAGE_SIZE, IS_RAGGED)

    number, _ = number_of_row(TILES)
    row = row_tile * BLOCK_M + number
    n = row // G
    q_rows = b * q_b + (h * G + row % G) * q_h + n.to(tl.int64) * q_n
    q = load_query_digits(
        *(q_ptr, q_rows, n < num_queries, query_factor(scale, HAS_SOFTCAP)),
        *(K_CODEC, DK, K_WIDTH, Q_PADDED, K_PADDED, K_BLOCK, K_LOG_BLOCK, TILES),
    )
    if HAS_MEAN:
        factors = load_factors(
            *(q_ptr, q_rows, n < num_queries, query_factor(scale, HAS_SOFTCAP), mean_ptr, h),
            *(DK, Q_PADDED, PAIRS, PAIRS_PADDED, IS_INTERLEAVED),
        )
        factors = in_digits(factors, q, TILES)

    r = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = r // G
    head = h * G + r % G
    is_row = n < num_queries
    limits = load_limits(
        *(row_tile, n, is_row, num_queries, b, head, rule),
        *(bounds_ptr, bounds_b, bounds_n, mask_ptr, mask_b, mask_h, mask_n, mask_t),
        *(G, BLOCK_M, HAS_BOUNDS, HAS_MASK),
    )

    factor = exponent_factor(q, HAS_SOFTCAP)
    softmax = empty_softmax(sinks_ptr, head, split, factor, BLOCK_M, BLOCK_N, HAS_SINKS)
    sums = empty_sums(BLOCK_M, BLOCK_N, V_PADDED, V_CODEC)

    pairs = load_pairs(pairs_ptr, K_CODEC, V_CODEC)
    ranges, first_step, last_step = tiles_of_split(split, num_splits, layout, rule, limits, BLOCK_N, HAS_MASK)
    run = load_run(meta_ptr, layout, num_columns, PAGE_SIZE, BLOCK_N)
    of_inside = rule
    if HAS_MEAN:
        places, of_inside = load_places(places_ptr, b, rule)
        ahead = places_inside(run, places)
    inside, behind = steps_inside(first_step, last_step, ranges, run, layout, of_inside, limits, BLOCK_N, HAS_MASK)
    if parts_of(K_CODEC) > 1:
        # Rows lie side by side: what they begin at a multiple of is known.
        k_t = K_WIDTH
    k_head, v_head = k_ptr + h * k_h, v_ptr + h * v_h
    k_scale_head, v_scale_head = k_scale_ptr + h * k_scale_h, v_scale_ptr + h * v_scale_h
    # No cosines and sines of edges are on their way: they would take the shared memory of many tiles.
    for edge in tl.range(first_step, last_step - behind + inside, num_stages=1 if HAS_MEAN else None):
        step = edge_at(edge, inside, behind)
        block, place, visible, wanted, index = visit_tile(
            *(step, ranges, b, layout, num_columns, rule, limits),
            *(PAGE_SIZE, BLOCK_N, HAS_BOUNDS, HAS_MASK),
        )
        # Integers of others may be anything: their weights are zero. Scales may not.
        exists = in_planes(step, ranges, layout, BLOCK_N)
        k = load_codes(k_head + (block * k_b + place * k_t), 1, exists, pairs, K_CODEC, K_WIDTH, K_PADDED, True)
        scales = load_scales(k_scale_head, block * k_scale_b, place, 0, wanted, K_CODEC, BLOCK_N, True)
        scores = scores_of(q, k, scales, K_CODEC, TILES, BLOCK_N, IS_ASSEMBLY)
        if HAS_MEAN:
            here = waves_at(waves_ptr, index, wanted, places, PAIRS_PADDED)
            scores = add_mean(scores, factors[0], factors[1], here, factors, TILES, BLOCK_N)
        scores = capped(scores, q, softcap, HAS_SOFTCAP)
        softmax, p, decay = soft_weights(scores, visible, softmax, factor, True)
        v = load_codes(v_head + (block * v_b + place), v_d, exists, pairs, V_CODEC, V_WIDTH, V_PADDED, True)
        if V_CODEC == "fp8":
            # A code may be NaN.
            v = tl.where(wanted[:, None], v, 0)
        scales = load_scales(v_scale_head, block * v_scale_b, place, 0, wanted, V_CODEC, BLOCK_N, True)
        sums = add_values(sums, p, decay, v, scales, V_CODEC, TILES, BLOCK_N, V_PADDED, IS_ASSEMBLY)

    if HAS_MEAN:
        waves = waves_inside(waves_ptr, 0, ranges, ahead, BLOCK_N, PAIRS_PADDED, True)
    for step in tl.range(inside, behind):
        block, place, more = locate_inside(step, ranges, b, layout, PAGE_SIZE, BLOCK_N, 1)
        k = load_codes(
            k_head + (block * k_b + place * k_t) + more * k_t, 1, 0, pairs, K_CODEC, K_WIDTH, K_PADDED, False, True
        )
        page, first, behind_it = locate_inside(step, ranges, b, layout, PAGE_SIZE, BLOCK_N, loaded_together(K_CODEC))
        scales = load_scales(k_scale_head, page * k_scale_b, first, behind_it, 0, K_CODEC, BLOCK_N, False)
        scores = scores_of(q, k, scales, K_CODEC, TILES, BLOCK_N, IS_ASSEMBLY)
        if HAS_MEAN:
            c, s = turned(factors, turns_ptr, step, ranges, ahead, BLOCK_N, PAIRS_PADDED)
            scores = add_mean(scores, c, s, waves, factors, TILES, BLOCK_N)
        scores = capped(scores, q, softcap, HAS_SOFTCAP)
        softmax, p, decay = soft_weights(scores, 0, softmax, factor, False)
        v = load_codes(v_head + (block * v_b + place) + more, v_d, 0, pairs, V_CODEC, V_WIDTH, V_PADDED, False)
        page, first, behind_it = locate_inside(step, ranges, b, layout, PAGE_SIZE, BLOCK_N, loaded_together(V_CODEC))
        scales = load_scales(v_scale_head, page * v_scale_b, first, behind_it, 0, V_CODEC, BLOCK_N, False)
        sums = add_values(sums, p, decay, v, scales, V_CODEC, TILES, BLOCK_N, V_PADDED, IS_ASSEMBLY)

    num_heads = tl.num_programs(1) * G
    rows = (b * num_heads + head) * num_queries + n
    num_rows = tl.num_programs(2).to(tl.int64) * num_heads * num_queries
    out_rows = split * num_rows + rows
    store_split(out_ptr, lse_ptr, out_rows, is_row, sums, softmax, factor, V_CODEC, DV, V_WIDTH, V_PADDED)
    if MERGED_SPLITS > 0:
        program = ((b * tl.num_programs(1) + h) * (tl.num_programs(0) // num_splits) + row_tile).to(tl.int32)
        merge_last(
            *((merged_ptr, merged_lse_ptr, counters_ptr), out_ptr, lse_ptr, program, rows, is_row, num_rows),
            *(num_splits, DV, M_PADDED, ROTATION, LOG_ROTATION, BLOCK_M, MERGED_SPLITS, FEW),
        )
