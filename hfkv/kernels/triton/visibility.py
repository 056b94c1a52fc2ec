"""Visibility: which held tokens each row of a tile of queries sees, by the numbers of `Visibility` or by a mask."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

# No position is as large: bounds are cut to it, so that sums of it and an index fit 32 bits.
FAR = tl.constexpr(1 << 30)


@triton.jit
def load_rule(meta_ptr, b, num_columns, META: tl.constexpr, IS_RAGGED: tl.constexpr = False):
    """Loads the numbers of the `Visibility` from `DeviceInputs.meta`, which lie there in the order of `SCALARS`.

    Args:
        meta_ptr: the numbers.
        b: the batch row, int64.
        num_columns: columns of the block table.
        IS_RAGGED: whether rows have numbers of their own, which lie behind all else in the order of `ROW_NUMBERS`.

    Returns:
        seen, first, held_from, num_slots, sinks and the row's pads.
    """
    if IS_RAGGED:
        batch = tl.num_programs(2)
        row_ptr = meta_ptr + META + batch + (3 + batch) * num_columns + b
        seen = tl.load(row_ptr + 3 * batch)
        first = tl.load(row_ptr + 4 * batch)
    else:
        seen = tl.load(meta_ptr + 4)
        first = tl.load(meta_ptr + 5)
    held_from = tl.load(meta_ptr + 6)
    num_slots = tl.load(meta_ptr + 7)
    sinks = tl.load(meta_ptr + 8)
    pad = tl.load(meta_ptr + META + b)
    return seen, first, held_from, num_slots, sinks, pad


@triton.jit
def load_limits(
    row_tile,
    n,
    is_row,
    num_queries,
    b,
    head,
    rule,
    bounds_ptr,
    bounds_b,
    bounds_n,
    mask_ptr,
    mask_b,
    mask_h,
    mask_n,
    mask_t,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Loads up to where each row of a tile of queries sees.

    Args:
        row_tile: the tile's index.
        n, head: the query and the query head of each row `[BLOCK_M]`; a query has ROWS rows.
        is_row: `[BLOCK_M]`, whether there is such a query.
        num_queries: q.
        b: the batch row, int64.
        rule: what `load_rule` gives.

    Returns:
        `is_row`; the rows' positions `[BLOCK_M]` and the highest of them; the lowest position that each sees
        `[BLOCK_M]`, or without bounds the row's pads, and the lowest of all; pointers to the rows of the mask
        `[BLOCK_M]`, or 0, and its last stride; the lowest of the rows' positions, and the highest of their bounds.
    """
    seen, _, _, _, _, pad = rule
    t = seen - num_queries + n
    t_first = seen - num_queries + row_tile * BLOCK_M // ROWS
    t_last = seen - num_queries + tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // ROWS, num_queries - 1)
    bound = pad
    lowest = pad
    highest = pad
    # The compiler takes no None in a tuple.
    mask_rows = 0
    if HAS_BOUNDS:
        bound_at = bounds_ptr + b * bounds_b + n.to(tl.int64) * bounds_n
        bound = tl.minimum(tl.load(bound_at, mask=is_row, other=FAR), FAR).to(tl.int32)
        lowest = tl.maximum(pad, tl.min(bound, 0))
        highest = tl.max(tl.where(is_row, bound, pad), 0)
    if HAS_MASK:
        mask_rows = mask_ptr + b * mask_b + head * mask_h + n.to(tl.int64) * mask_n
    return is_row, t, t_last, bound, lowest, mask_rows, mask_t, t_first, highest


@triton.jit
def seen_in(index, is_held, rule, limits, HAS_BOUNDS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Says which tokens of a tile the rows of queries see, by the law of `Visibility`.

    Args:
        index, is_held: of its slots, as `locate` gives them.
        rule, limits: what `load_rule` and `load_limits` give.

    Returns:
        Who sees which `[BLOCK_M, BLOCK_N]`, and which are to be loaded `[BLOCK_N]`.
    """
    _, first, held_from, num_slots, sinks, pad = rule
    is_row, t, t_last, bound, lowest, mask_rows, mask_t, _, _ = limits
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
    return visible, wanted
