"""The trellis of int2, to the bits of `hfkv.codecs.trellis`: rows are written by Viterbi's algorithm."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from hfkv.codecs import trellis
from hfkv.kernels.triton.bits.log_scale import best_scale, has_numbers, nearest_scale, row_sums, shifted, to_scales
from hfkv.kernels.triton.bits.parts import in_parts
from hfkv.kernels.triton.numbers import round_half_even

STATES = tl.constexpr(64)
# By the ten bits that say what two numbers are.
PAIRS = tl.constexpr(1024)
DEVIATION = tl.constexpr(trellis.DEVIATION)


@functools.cache
def numbers_of_windows(device: torch.device) -> torch.Tensor:
    """The numbers, int8 `[256]`, of windows whose newest pair of bits is the lowest."""
    with torch.inference_mode(False):
        return torch.tensor(trellis.NUMBERS, dtype=torch.int8, device=device)


@functools.cache
def pairs_of_strings(device: torch.device) -> torch.Tensor:
    """Two numbers, a byte each and the first one lower, by ten bits of a string as it lies: int16 `[1024]`."""
    with torch.inference_mode(False):
        words = torch.arange(PAIRS.value, device="cpu") << 2
        strings = torch.stack((words & 0xFF, words >> 8), dim=-1).to(torch.uint8)
        numbers = trellis.decode(strings, 4)[:, :2].to(torch.int16)
        return (numbers[:, 0] & 0xFF | numbers[:, 1] << 8).to(device)


def bytes_of_paths(width: int) -> int:
    """Bytes that `write_string` needs for a row of `width` numbers."""
    return (width + 3) // 4 * STATES.value


@triton.jit
def _least_cost(paths_at, parts, numbers_ptr, D: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Stores by which of four paths every state is come to, two bits of each of four numbers, a byte of the string.

    Returns:
        The states `[ROWS]` in which the cheapest paths end; of those that cost the same the lowest.
    """
    quarter: tl.constexpr = (D + 3) // 4
    state = tl.arange(0, STATES)
    window = state[:, None] * 4 + tl.arange(0, 4)[None, :]
    numbers = tl.load(numbers_ptr + window).to(tl.int32)
    # In units of four: there is room for what path a window is on, of the four that meet in a state.
    path = window // STATES
    squares = (4 * numbers * numbers + path)[None, :, :]
    by_number = (-4 * numbers)[None, :, :]
    cost = tl.zeros([ROWS, STATES], tl.int32)
    place = tl.arange(0, PADDED // 4)[None, None, :]
    pair = tl.arange(0, 4)[None, :]
    for byte in tl.range(0, quarter, num_stages=1):
        four = tl.sum(tl.where(place == byte, parts, 0), 2)
        paths = tl.zeros([ROWS, STATES], tl.int32)
        for index in tl.static_range(4):
            number = tl.sum(tl.where(pair == index, four, 0), 1)
            of_windows = squares + number[:, None, None] * by_number
            if (index + 1) * quarter > D:
                # Behind the row all windows are as good.
                of_windows = tl.where(index * quarter + byte < D, of_windows, path[None, :, :])
            best = tl.min(tl.reshape(cost[:, :, None] + of_windows, (ROWS, 4, STATES)), 1)
            paths |= (best & 3) << (2 * index)
            cost = best & -4
        tl.store(paths_at[:, None] + byte * STATES + state[None, :], paths.to(tl.uint8))
    least = tl.min(cost, 1)
    return tl.min(tl.where(cost == least[:, None], state[None, :], STATES), 1)


@triton.jit
def write_string(
    y,
    rows,
    stride,
    scale_at,
    is_new,
    ptr,
    numbers_ptr,
    paths_ptr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores rows `[ROWS, WIDTH]` that are rotated: the strings of the least squared error, and the bytes of scales.

    Args:
        rows: int64 `[ROWS]`, where the bytes of each begin behind `ptr`, `stride` apart.
        scale_at: pointers `[ROWS]` to the scales.
        is_new: `[ROWS]`, which rows are stored.
        numbers_ptr: `numbers_of_windows`.
        paths_ptr: room for `bytes_of_paths` of every row.
    """
    quarter: tl.constexpr = (D + 3) // 4
    padded: tl.constexpr = 4 if WIDTH < 4 else WIDTH
    squares = row_sums(y * y, ROWS, WIDTH)
    middle = nearest_scale(squares * (1.0 / (D * DEVIATION * DEVIATION)))
    is_there = has_numbers(middle)
    half = to_scales(shifted(middle, 0)) * 0.5
    doubled = tl.div_rn(y, tl.broadcast_to(half[:, None], (ROWS, WIDTH)))
    doubled = round_half_even(tl.where(is_there[:, None], doubled, 0.0)).to(tl.int32)
    parts = tl.reshape(in_parts(doubled, 4, D, ROWS, WIDTH, padded), (ROWS, 4, padded // 4))

    paths_at = paths_ptr + tl.arange(0, ROWS) * (quarter * STATES)
    # Others may still read what they wrote there before.
    tl.debug_barrier()
    state = _least_cost(paths_at, parts, numbers_ptr, D, ROWS, padded)
    tl.debug_barrier()

    products = tl.zeros([ROWS], tl.int32)
    of_codes = tl.zeros([ROWS], tl.int32)
    place = tl.arange(0, padded // 4)[None, None, :]
    pair = tl.arange(0, 4)[None, :]
    at = ptr + rows
    for step in tl.range(0, quarter, num_stages=1):
        byte = quarter - 1 - step
        four = tl.sum(tl.where(place == byte, parts, 0), 2)
        bits = tl.zeros([ROWS], tl.int32)
        for index in tl.static_range(3, -1, -1):
            paths = tl.load(paths_at + byte * STATES + state).to(tl.int32)
            window = ((paths >> (2 * index)) & 3) * STATES + state
            bits |= (window & 3) << (2 * index)
            number = tl.load(numbers_ptr + window).to(tl.int32)
            if (index + 1) * quarter > D:
                number = tl.where(index * quarter + byte < D, number, 0)
            products += number * tl.sum(tl.where(pair == index, four, 0), 1)
            of_codes += number * number
            state = window >> 2
        bits = tl.where(is_there, bits, 0).to(tl.uint8)
        tl.store(at + (byte + 1).to(tl.int64) * stride, bits, mask=is_new)
    bits = ((state >> 4) & 3) << 2 | ((state >> 2) & 3) << 4 | (state & 3) << 6
    tl.store(at, tl.where(is_there, bits, 0).to(tl.uint8), mask=is_new)
    scale, _ = best_scale(squares, products.to(tl.float32) * half, of_codes.to(tl.float32))
    tl.store(scale_at, tl.where(is_there, scale, middle).to(tl.uint8), mask=is_new)


@triton.jit
def numbers_of_string(before, last, pairs):
    """Reads rows of int2 as numbers, int8 `[N, 4 n]`.

    Args:
        before, last: bytes `[N, n]`, of which the latter say what numbers are, together with those before them, or such
            words `[N, n / 4]`.
        pairs: `pairs_of_strings`.
    """
    rows: tl.constexpr = last.shape[0]
    if last.dtype == tl.uint8:
        words = before.to(tl.int32) | (last.to(tl.int32) << 8)
        at = tl.join(words >> 2, words >> 6) & (PAIRS - 1)
        found = tl.reshape(tl.gather(pairs, tl.reshape(at, (at.numel,)), 0), at.shape)
        numbers = tl.permute(tl.join(found.to(tl.int8), (found >> 8).to(tl.int8)), (0, 2, 3, 1))
        return tl.reshape(numbers, (rows, 4 * last.shape[1]))
    else:
        # Of the last of four bytes some bits are in the word behind.
        at = tl.join(tl.join(before >> 2, before >> 18), tl.join(before >> 10, last >> 18))
        at = (tl.join(at, at >> 4) & (PAIRS - 1)).to(tl.int32)
        found = tl.reshape(tl.gather(pairs, tl.reshape(at, (at.numel,)), 0), at.shape)
        numbers = tl.permute(tl.join(found.to(tl.int8), (found >> 8).to(tl.int8)), (0, 4, 5, 1, 2, 3))
        return tl.reshape(numbers, (rows, 16 * last.shape[1]))
