"""Tiles of held tokens: where they lie, which of them queries can see, and how splits share them out.

A tile is BLOCK_N neighbouring slots. Contiguous planes are counted in places, from the last multiple of BLOCK_N that is
not behind the first held token; paged ones column by column, P slots each, some of them not held. The slot of a held
token is at least its index, and at most `unused` more, the number of slots in front of the last held token that hold
nothing.

Tiles that all queries of a program see in full lie inside, in one run: no mask is made for them. The others are edges.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.visibility import seen_in


@triton.jit
def load_layout(meta_ptr, b, num_columns, META: tl.constexpr, PAGE_SIZE: tl.constexpr, IS_RAGGED: tl.constexpr = False):
    """Loads the numbers of the `Layout` from `DeviceInputs.meta`, which lie there in the order of `SCALARS`.

    Args:
        meta_ptr: the numbers.
        b: the batch row, int64.
        num_columns: columns of the block table.
        IS_RAGGED: whether rows have lengths of their own, which lie behind all else in the order of `ROW_NUMBERS`.

    Returns:
        start, length, the slot behind the last held token, counted from `start` or column by column, where the spans
        begin, and where the row's part of the block table does.
    """
    start = tl.load(meta_ptr)
    length = tl.load(meta_ptr + 1)
    spans_ptr = meta_ptr + META + tl.num_programs(2)
    table_ptr = spans_ptr + 3 * num_columns + b * num_columns
    last_ptr = meta_ptr + 2
    to_next = 1
    if IS_RAGGED:
        to_next = tl.num_programs(2)
        row_ptr = spans_ptr + (3 + to_next) * num_columns + b
        length = tl.load(row_ptr)
        last_ptr = row_ptr + to_next
    end_slot = length
    if PAGE_SIZE > 0:
        end_slot = tl.load(last_ptr) * PAGE_SIZE + tl.load(last_ptr + to_next)
    return start, length, end_slot, spans_ptr, table_ptr


@triton.jit
def load_run(meta_ptr, layout, num_columns, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Finds the longest run of slots that all hold tokens, one behind the other.

    Returns:
        Its first slot, the one behind its last, as tiles are counted, and how much larger its slots are than the
        indices of the tokens there.
    """
    start, length, _, spans_ptr, _ = layout
    if PAGE_SIZE == 0:
        lead = start % BLOCK_N
        return lead, lead + length, lead
    else:
        full_from = tl.load(meta_ptr + 9)
        full_to = tl.load(meta_ptr + 10)
        is_run = full_from < full_to
        high = tl.load(spans_ptr + num_columns + full_from, mask=is_run, other=0)
        index = tl.load(spans_ptr + 2 * num_columns + full_from, mask=is_run, other=0)
        begin = full_from * PAGE_SIZE
        end = tl.where(high == PAGE_SIZE, full_to * PAGE_SIZE, begin)
        return begin, end, begin - index


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
    """Finds the tiles in which queries up to `t_last` may see something: three ranges in order, each `begin, end`.

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
def tile_at(step, ranges):
    """Gives the tile at `step` of a walk through the three ranges of `tile_ranges`, as `tiles_of_split` gives them."""
    slots_begin, in_slots, sinks_begin, in_sinks, newest_begin, _ = ranges
    tile = newest_begin + step - in_slots - in_sinks
    tile = tl.where(step < in_slots + in_sinks, sinks_begin + step - in_slots, tile)
    return tl.where(step < in_slots, slots_begin + step, tile)


@triton.jit
def locate(tile, b, layout, num_columns, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Finds where the tokens of a tile lie.

    Returns:
        The held index of each slot, whether it is held, the row or page (one or BLOCK_N of them) and the place in it,
        both int64.
    """
    start, length, end_slot, spans_ptr, table_ptr = layout
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:
        lead = start % BLOCK_N
        index = slot - lead
        is_held = (index >= 0) & (index < length)
        block = b
        place = tl.multiple_of(start - lead, BLOCK_N) + slot
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
        exists = column * PAGE_SIZE < end_slot
        low = tl.load(spans_ptr + column, mask=exists, other=0)
        high = tl.load(spans_ptr + num_columns + column, mask=exists, other=0)
        is_held = (place >= low) & (place < high)
        index = tl.load(spans_ptr + 2 * num_columns + column, mask=exists, other=0) + place - low
        block = tl.load(table_ptr + column, mask=exists, other=0)
        if PAGE_SIZE & (PAGE_SIZE - 1) == 0:
            block = tl.max_constancy(block, PAGE_SIZE)
    return index, is_held, block.to(tl.int64), place.to(tl.int64)


@triton.jit
def tiles_of_split(split, num_splits, layout, rule, limits, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr):
    """Gives one split its share of the tiles in which a tile of queries may see something.

    Args:
        layout, rule, limits: as `load_layout`, `load_rule` and `load_limits` give them.

    Returns:
        The ranges, as `tile_at` takes them, and the split's first step through them and the one behind its last.
    """
    start, length, end_slot, _, _ = layout
    _, first, held_from, num_slots, sinks, pad = rule
    _, _, t_last, _, lowest, _, _, _, _ = limits
    # Pages do not start anywhere.
    end_slot += start % BLOCK_N
    slots_begin, slots_end, sinks_begin, sinks_end, newest_begin, newest_end = tile_ranges(
        first, length, end_slot, num_slots, held_from, pad, sinks, lowest, t_last, BLOCK_N, HAS_MASK
    )
    in_slots = slots_end - slots_begin
    in_sinks = sinks_end - sinks_begin
    num_tiles = in_slots + in_sinks + newest_end - newest_begin
    per_split = tl.cdiv(num_tiles, num_splits)
    ranges = (slots_begin, in_slots, sinks_begin, in_sinks, newest_begin, newest_end)
    return ranges, split * per_split, tl.minimum((split + 1) * per_split, num_tiles)


@triton.jit
def steps_inside(
    first_step, last_step, ranges, run, layout, rule, limits, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Finds the steps of a split whose tiles all of its queries see in full: the first, and the one behind the last.

    Args:
        first_step, last_step, ranges: what `tiles_of_split` gives.
        run: what `load_run` gives.
    """
    if HAS_MASK:
        return last_step, last_step
    else:
        _, length, _, _, _ = layout
        _, first, held_from, num_slots, _, pad = rule
        _, _, _, _, _, _, _, t_first, highest = limits
        _, in_slots, _, in_sinks, newest_begin, newest_end = ranges
        run_begin, run_end, more = run
        shift = num_slots - held_from
        begin = tl.maximum(tl.maximum(first, num_slots), tl.maximum(pad, highest) + shift)
        end = tl.minimum(t_first + 1 + shift, length)
        begin = tl.maximum(tl.cdiv(tl.maximum(begin + more, run_begin), BLOCK_N), newest_begin)
        end = tl.minimum(tl.maximum(tl.minimum(end + more, run_end), 0) // BLOCK_N, newest_end)
        before = in_slots + in_sinks - newest_begin
        begin = tl.minimum(tl.maximum(begin + before, first_step), last_step)
        return begin, tl.maximum(tl.minimum(end + before, last_step), begin)


@triton.jit
def edge_at(step, inside_begin, inside_end):
    """Gives the step through all tiles that is the edges' own `step`, counted from the first step of the split."""
    return tl.where(step < inside_begin, step, step + inside_end - inside_begin)


@triton.jit
def visit_tile(
    step,
    ranges,
    b,
    layout,
    num_columns,
    rule,
    limits,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Finds where the tokens of the tile at a step lie, and who sees them.

    Returns:
        The row or page and the place in it, as `locate` gives them; who sees which, and which are to be loaded, as
        `seen_in` does; and the held indices.
    """
    tile = tile_at(step, ranges)
    index, is_held, block, place = locate(tile, b, layout, num_columns, PAGE_SIZE, BLOCK_N)
    visible, wanted = seen_in(index, is_held, rule, limits, HAS_BOUNDS, HAS_MASK)
    return block, place, visible, wanted, index


@triton.jit
def in_planes(step, ranges, layout, BLOCK_N: tl.constexpr):
    """Says which slots of the tile at a step lie in planes of a multiple of 16 slots, at least those that hold tokens.

    Whole groups of 16 do or do not, so that they are loaded at once.
    """
    start, _, end_slot, _, _ = layout
    slot = tile_at(step, ranges) * BLOCK_N + tl.arange(0, BLOCK_N)
    return slot // 16 * 16 < end_slot + start % BLOCK_N


@triton.jit
def locate_inside(step, ranges, b, layout, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, EVERY: tl.constexpr = 1):
    """Finds where the tokens of a tile inside lie: one behind the other, in one row or page or in whole pages.

    Returns:
        The row or page and the place in it, int64: one of each, and how far behind it each token lies `[BLOCK_N]`,
        int32; or, where pages are smaller than tiles, BLOCK_N of each, and zeros. Of tokens only EVERY so many.
    """
    start, _, _, _, table_ptr = layout
    _, in_slots, _, in_sinks, newest_begin, _ = ranges
    tile = newest_begin + step - in_slots - in_sinks
    more = tl.arange(0, BLOCK_N // EVERY) * EVERY
    if PAGE_SIZE == 0:
        block = b
        place = tl.multiple_of(start - start % BLOCK_N + tile * BLOCK_N, BLOCK_N)
    elif PAGE_SIZE % BLOCK_N == 0:
        column = tile // (PAGE_SIZE // BLOCK_N)
        block = tl.load(table_ptr + column)
        place = tl.multiple_of(tile * BLOCK_N - column * PAGE_SIZE, BLOCK_N)
    else:
        slot = tile * BLOCK_N + more
        block = tl.load(table_ptr + slot // PAGE_SIZE)
        if PAGE_SIZE & (PAGE_SIZE - 1) == 0:
            block = tl.max_constancy(block, PAGE_SIZE // EVERY)
        place = slot % PAGE_SIZE
        more = more * 0
    return block.to(tl.int64), place.to(tl.int64), more
