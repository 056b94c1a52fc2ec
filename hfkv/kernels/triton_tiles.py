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
