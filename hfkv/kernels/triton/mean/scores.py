"""What scores lack of keys that were written less their mean, as a product of queries and mean with cosines and sines.

Of each pair of numbers that the rotation by position turns, by an angle w a position, a query and the mean give c and
s, by which a score at position p is c cos(p w) + s sin(p w) too low. Few queries are turned themselves, to the turn
(each 16th position) that a tile begins behind: all tiles inside meet the same cosines and sines then, and those of
other positions are not read. Many queries, and tiles at an edge, meet those of their own positions.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.mean.tables import TURN as _TURN
from hfkv.kernels.triton.tiles import tile_at

TURN = tl.constexpr(_TURN)
# Rows of a tile from which on cosines and sines are read for each position.
MANY_ROWS = tl.constexpr(64)


@triton.jit
def load_factors(
    q_ptr,
    rows,
    is_row,
    factor,
    mean_ptr,
    h,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """Loads queries and the mean of a kv head as what scores lack of each pair.

    Args:
        q_ptr: the queries.
        rows: int64 `[M]`, where each begins.
        is_row: `[M]`.
        factor: what scores are multiplied by.
        mean_ptr: the means, float32 `[H, D]`.
        h: the kv head.

    Returns:
        c and s, float32 `[M, PADDED]` of magnitudes up to one; what these are to be multiplied by `[M]`; and what
        numbers that are not turned give `[M]`.
    """
    pair = tl.arange(0, PADDED)
    is_pair = pair < PAIRS
    first = 2 * pair if IS_INTERLEAVED else pair
    apart = 1 if IS_INTERLEAVED else PAIRS
    m_at = mean_ptr + h * D
    m_first = tl.load(m_at + first, mask=is_pair, other=0.0)[None, :] * factor
    m_second = tl.load(m_at + first + apart, mask=is_pair, other=0.0)[None, :] * factor
    q_at = q_ptr + rows[:, None] + first[None, :]
    is_there = is_row[:, None] & is_pair[None, :]
    q_first = tl.load(q_at, mask=is_there, other=0.0).to(tl.float32)
    q_second = tl.load(q_at + apart, mask=is_there, other=0.0).to(tl.float32)
    c = q_first * m_first + q_second * m_second
    s = q_second * m_first - q_first * m_second
    size = tl.maximum(tl.max(tl.abs(c) + tl.abs(s), 1), 1e-28)
    rest = tl.zeros_like(size)
    if 2 * PAIRS < D:
        d = tl.arange(0, D_PADDED)
        is_rest = (d >= 2 * PAIRS) & (d < D)
        q = tl.load(q_ptr + rows[:, None] + d[None, :], mask=is_row[:, None] & is_rest[None, :], other=0.0)
        rest += tl.sum(q.to(tl.float32) * (tl.load(m_at + d, mask=is_rest, other=0.0) * factor)[None, :], 1)
    return c / size[:, None], s / size[:, None], size, rest


@triton.jit
def load_places(places_ptr, b, rule):
    """Loads where the tokens of a row stand.

    Returns:
        The number of slots, and the position of index 0 behind them; and the rule by which tiles lie inside, none of
        them with slots.
    """
    num_slots = tl.load(places_ptr)
    seen, first, held_from, rule_slots, sinks, pad = rule
    of_inside = (seen, tl.maximum(first, num_slots), held_from, rule_slots, sinks, pad)
    return (num_slots, tl.load(places_ptr + 1 + b)), of_inside


@triton.jit
def load_waves(waves_ptr, position, PADDED: tl.constexpr):
    """Loads the cosines and the sines at positions `[N]`, negative ones too: `[N, PADDED]` each."""
    at = waves_ptr + position.to(tl.int64)[:, None] * (2 * PADDED) + tl.arange(0, PADDED)[None, :]
    return tl.load(at), tl.load(at + PADDED)


@triton.jit
def waves_at(waves_ptr, index, wanted, places, PADDED: tl.constexpr):
    """Loads the cosines and the sines where the tokens of a tile stand, or those of position 0 where none is wanted.

    Args:
        waves_ptr: `MeanTables.waves`.
        index: the tokens' indices `[N]`.
        wanted: `[N]`.
        places: what `load_places` gives.
    """
    num_slots, shift = places
    position = tl.where(index < num_slots, index, index + shift)
    return load_waves(waves_ptr, tl.where(wanted, position, 0), PADDED)


@triton.jit
def places_inside(run, places):
    """Gives how many turns the tiles inside stand further on than they are counted, and positions behind a turn.

    Args:
        run: what `load_run` gives.
        places: what `load_places` gives.
    """
    _, _, more = run
    _, shift = places
    ahead = shift - more
    # Rounded down, as no division of negative numbers does.
    behind = ((ahead % TURN) + TURN) % TURN
    return (ahead - behind) // TURN, behind


@triton.jit
def waves_inside(waves_ptr, step, ranges, inside, BLOCK_N: tl.constexpr, PADDED: tl.constexpr, IS_TURNED: tl.constexpr):
    """Loads the cosines and the sines of the tile inside at a step; with IS_TURNED, those of all from their turn on.

    Args:
        waves_ptr: `MeanTables.waves`.
        step, ranges: what `tile_at` takes.
        inside: what `places_inside` gives.
    """
    turn, position = inside
    if not IS_TURNED:
        position += tile_at(step, ranges) * BLOCK_N + turn * TURN
    return load_waves(waves_ptr, position + tl.arange(0, BLOCK_N), PADDED)


@triton.jit
def turned(factors, turns_ptr, step, ranges, inside, BLOCK_N: tl.constexpr, PADDED: tl.constexpr):
    """Turns c and s of `load_factors` to the turn that the tile inside at a step begins behind.

    Args:
        factors: what `load_factors` gives.
        turns_ptr: `MeanTables.turns`.
        step, ranges: what `tile_at` takes.
        inside: what `places_inside` gives.
    """
    c, s, _, _ = factors
    turn, _ = inside
    turn += tile_at(step, ranges) * (BLOCK_N // TURN)
    at = turns_ptr + turn.to(tl.int64) * (2 * PADDED) + tl.arange(0, PADDED)
    cos, sin = tl.load(at)[None, :], tl.load(at + PADDED)[None, :]
    return c * cos + s * sin, s * cos - c * sin


@triton.jit
def lacking(c, s, waves):
    """Multiplies c and s of `load_factors`, or as they are `turned`, by cosines and sines: float32 `[M, N]`."""
    cos, sin = waves
    lack = tl.dot(c.to(cos.dtype), tl.trans(cos), input_precision="ieee")
    return tl.dot(s.to(cos.dtype), tl.trans(sin), lack, input_precision="ieee")


@triton.jit
def add_mean(scores, c, s, waves, factors):
    """Adds to scores what they lack.

    Args:
        scores: float32 `[M, N]`.
        c, s: those of `load_factors`, or as they are `turned`.
        waves: what `waves_at` or `waves_inside` gives.
        factors: what `load_factors` gives.
    """
    _, _, size, rest = factors
    return scores + (lacking(c, s, waves) * size[:, None] + rest[:, None])
