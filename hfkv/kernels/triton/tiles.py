"""Tiles of held tokens: which of them queries can see, where their tokens lie, and what is loaded of them.

A tile is BLOCK_N neighbouring slots. Contiguous planes are counted from the first held token on, so that slot i is held
token i; paged ones column by column, P slots each, some of them not held. The slot of a held token is at least its
index, and at most `unused` more, the number of slots in front of the last held token that hold nothing.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

# No position is as large: bounds are cut to it, so that sums of it and an index fit 32 bits.
FAR = tl.constexpr(1 << 30)


@triton.jit
def load_rule(meta_ptr, b, num_columns, META: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Loads what `DeviceInputs.meta` says of batch row `b`, int64; its numbers are those of `SCALARS`.

    Returns:
        start, length, the slot behind the last held token, seen, first, held_from, num_slots, sinks, the row's pads,
        and where the spans and the row's part of the block table begin.
    """
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
    return start, length, end_slot, seen, first, held_from, num_slots, sinks, pad, spans_ptr, table_ptr


@triton.jit
def tile_ranges(
    first,
    length,
    end_slot,
    num_slots,
    held_from,
    pad,
    sinks,
    lowest,
    t_last,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The tiles in which queries up to `t_last` may see something, as three ranges in order, each `begin, end`.

    They hold the slots in front, the sinks still among the newest tokens, and the tokens from position `lowest` on.
    """
    unused = end_slot - length
    last_tile = tl.cdiv(end_slot, BLOCK_N)
    slots_begin = first // BLOCK_N
    if HAS_MASK:
        slots_end = last_tile
        sinks_begin = last_tile
        sinks_end = last_tile
        newest_begin = last_tile
        newest_end = last_tile
    else:
        slots_end = tl.cdiv(tl.minimum(num_slots, length) + unused, BLOCK_N)
        slots_end = tl.where(first < num_slots, tl.minimum(slots_end, last_tile), slots_begin)
        shift = num_slots - held_from
        behind = tl.maximum(num_slots, first)
        low = tl.maximum(pad + shift, behind)
        high = tl.minimum(pad + sinks + shift, length)
        sinks_begin = tl.maximum(tl.minimum(low, length) // BLOCK_N, slots_end)
        sinks_end = tl.minimum(tl.cdiv(high + unused, BLOCK_N), last_tile)
        sinks_end = tl.where(low < high, tl.maximum(sinks_end, sinks_begin), sinks_begin)
        low = tl.maximum(lowest + shift, behind)
        high = tl.minimum(t_last + 1 + shift, length)
        newest_begin = tl.maximum(tl.minimum(low, length) // BLOCK_N, sinks_end)
        newest_end = tl.minimum(tl.cdiv(high + unused, BLOCK_N), last_tile)
        newest_end = tl.where(low < high, tl.maximum(newest_end, newest_begin), newest_begin)
    return slots_begin, slots_end, sinks_begin, sinks_end, newest_begin, newest_end


@triton.jit
def tile_at(step, slots_begin, in_slots, sinks_begin, in_sinks, newest_begin):
    """The tile that comes `step`-th of those in the ranges of `tile_ranges`, the first two of so many tiles."""
    tile = newest_begin + step - in_slots - in_sinks
    tile = tl.where(step < in_slots + in_sinks, sinks_begin + step - in_slots, tile)
    return tl.where(step < in_slots, slots_begin + step, tile)


@triton.jit
def locate(
    tile,
    b,
    start,
    length,
    end_slot,
    spans_ptr,
    table_ptr,
    num_columns,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where a tile's tokens lie.

    Returns:
        The held index of each slot, whether it is held, the row or page (one or BLOCK_N of them) and the place in it,
        both int64.
    """
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:
        index = slot
        is_held = slot < length
        block = b
        place = start + slot
    elif PAGE_SIZE % BLOCK_N == 0:
        column = tile // (PAGE_SIZE // BLOCK_N)
        place = slot - column * PAGE_SIZE
        low = tl.load(spans_ptr + column)
        is_held = (place >= low) & (place < tl.load(spans_ptr + num_columns + column))
        index = tl.load(spans_ptr + 2 * num_columns + column) + place - low
        block = tl.load(table_ptr + column)
    else:
        column = slot // PAGE_SIZE
        place = slot % PAGE_SIZE
        exists = slot < end_slot
        low = tl.load(spans_ptr + column, mask=exists, other=0)
        high = tl.load(spans_ptr + num_columns + column, mask=exists, other=0)
        is_held = (place >= low) & (place < high)
        index = tl.load(spans_ptr + 2 * num_columns + column, mask=exists, other=0) + place - low
        block = tl.load(table_ptr + column, mask=exists, other=0)
    return index, is_held, block.to(tl.int64), place.to(tl.int64)


@triton.jit
def seen_in(
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
    HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """What the rows of queries see of a tile: `Visibility`.

    Args:
        index, is_held: of its slots, as `locate` gives them.
        is_row: `[BLOCK_M]`.
        t: the rows' positions `[BLOCK_M]`; `t_last` is the highest.
        bound: the lowest position that each sees `[BLOCK_M]`, or None; `lowest` is the lowest of all.
        mask_rows: pointers to the rows of the mask `[BLOCK_M]`, or None; `mask_t` is its last stride.

    Returns:
        Who sees which `[BLOCK_M, BLOCK_N]`, and which are to be loaded `[BLOCK_N]`.
    """
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


@triton.jit
def load_rows(ptr, rows, wanted, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Loads `[BLOCK_N, PADDED]`, zeros where a row is not wanted and behind its WIDTH numbers.

    Args:
        ptr: a data plane.
        rows: int64 `[BLOCK_N]`, where the rows begin.
        wanted: `[BLOCK_N]`.
    """
    d = tl.arange(0, PADDED)
    return tl.load(ptr + rows[:, None] + d[None, :], mask=wanted[:, None] & (d < WIDTH)[None, :], other=0)


@triton.jit
def decoded(x, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Data of a codec other than int4 as numbers still to be multiplied by their scale."""
    if CODEC == "fp8":
        return x.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def low_nibbles(x, DTYPE: tl.constexpr):
    """The first halves of rows of int4."""
    return (x & 0xF).to(tl.int8).to(DTYPE)


@triton.jit
def high_nibbles(x, DTYPE: tl.constexpr):
    """The second halves of rows of int4."""
    return (x >> 4).to(tl.int8).to(DTYPE)
