"""Tiles of tokens as the attention kernels load them: data as they are stored, scales and offsets."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.bits.levels import numbers_of_levels
from hfkv.kernels.triton.bits.log_scale import ONE, to_scales
from hfkv.kernels.triton.bits.trellis import PAIRS, numbers_of_string


@triton.jit
def load_rows(at, stride, wanted, WIDTH: tl.constexpr, PADDED: tl.constexpr, IS_MASKED: tl.constexpr):
    """Loads `[BLOCK_N, PADDED]`, zeros where a row is not wanted and behind its WIDTH numbers.

    Args:
        at: pointers to where the rows of a data plane begin `[BLOCK_N]`.
        stride: distance of one number of a row from the next.
        wanted: `[BLOCK_N]`; not looked at unless IS_MASKED.
    """
    d = tl.arange(0, PADDED)
    row_at = at[:, None] + (d * stride)[None, :]
    if IS_MASKED:
        return tl.load(row_at, mask=wanted[:, None] & (d < WIDTH)[None, :], other=0)
    elif WIDTH < PADDED:
        return tl.load(row_at, mask=(d < WIDTH)[None, :], other=0)
    else:
        return tl.load(row_at)


@triton.jit
def load_pairs(pairs_ptr, K_CODEC: tl.constexpr, V_CODEC: tl.constexpr):
    """Loads `pairs_of_strings` where there is int2."""
    if (K_CODEC == "int2") | (V_CODEC == "int2"):
        return tl.load(pairs_ptr + tl.arange(0, PAIRS))
    else:
        return 0


@triton.jit
def _load_words(at, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Loads rows of WIDTH bytes side by side by words, wherever they begin, as no row of int2 does at a word.

    Every word that is read has a byte of the row in it.

    Returns:
        Words `[BLOCK_N, PADDED / 4]` of the row from its first byte on, and of those from its second byte on.
    """
    address = at.to(tl.int64)
    shift = ((address & 3) * 8).to(tl.uint32)[:, None]
    word = tl.arange(0, PADDED // 4)
    words_at = (address & -4).to(tl.pointer_type(tl.uint32))[:, None] + word[None, :]
    if WIDTH - 1 < PADDED:
        lower = tl.load(words_at, mask=(4 * word < WIDTH - 1)[None, :], other=0)
        upper = tl.load(words_at + 1, mask=(4 * word < WIDTH - 1)[None, :], other=0)
    else:
        lower = tl.load(words_at)
        upper = tl.load(words_at + 1)
    first = (lower >> shift) | ((upper << 1) << (31 - shift))
    return first, (first >> 8) | ((upper >> shift) << 24)


@triton.jit
def load_codes(
    at,
    stride,
    wanted,
    pairs,
    CODEC: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    IS_MASKED: tl.constexpr,
    ARE_SIDE_BY_SIDE: tl.constexpr = False,
):
    """Loads data as they are stored: what `decoded` takes.

    Args:
        at, stride, wanted: arguments of `load_rows`.
        pairs: what `load_pairs` gives.
        ARE_SIDE_BY_SIDE: whether the numbers of a token lie so, and all are wanted.

    Returns:
        `[BLOCK_N, PADDED]`, of int3 and int2 the bytes that belong together, with what numbers are read by.
    """
    if CODEC == "int3":
        OF_PART: tl.constexpr = WIDTH // 3  # noqa: N806
        first = load_rows(at, stride, wanted, OF_PART, PADDED // 8, IS_MASKED)
        second = load_rows(at + OF_PART * stride, stride, wanted, OF_PART, PADDED // 8, IS_MASKED)
        return first, second, load_rows(at + 2 * OF_PART * stride, stride, wanted, OF_PART, PADDED // 8, IS_MASKED)
    elif (CODEC == "int2") & ARE_SIDE_BY_SIDE:
        before, last = _load_words(at, WIDTH, PADDED // 4)
        return before, last, pairs
    elif CODEC == "int2":
        before = load_rows(at, stride, wanted, WIDTH - 1, PADDED // 4, IS_MASKED)
        return before, load_rows(at + stride, stride, wanted, WIDTH - 1, PADDED // 4, IS_MASKED), pairs
    else:
        return load_rows(at, stride, wanted, WIDTH, PADDED, IS_MASKED)


@triton.jit
def load_scales(at, wanted, CODEC: tl.constexpr, IS_MASKED: tl.constexpr):
    """Loads float32 `[BLOCK_N]` scales, and the offsets of int4; ones and zeros where there are none."""
    scale = tl.full(at.shape, 1.0, tl.float32)
    low = tl.zeros(at.shape, tl.float32)
    if (CODEC == "int3") | (CODEC == "int2"):
        scale = to_scales((tl.load(at, mask=wanted, other=ONE) if IS_MASKED else tl.load(at)).to(tl.int32))
    elif CODEC != "none":
        scale = (tl.load(at, mask=wanted, other=1.0) if IS_MASKED else tl.load(at)).to(tl.float32)
    if CODEC == "int4":
        low = (tl.load(at + 1, mask=wanted, other=0.0) if IS_MASKED else tl.load(at + 1)).to(tl.float32)
    return scale, low


@triton.jit
def load_tokens(
    at,
    stride,
    scale_at,
    wanted,
    pairs,
    CODEC: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Loads the keys or the values of a tile.

    Args:
        at, stride, wanted, pairs: arguments of `load_codes`.
        scale_at: pointers to the scales `[BLOCK_N]`.

    Returns:
        Data as `load_codes` gives them, scales and offsets.
    """
    data = load_codes(at, stride, wanted, pairs, CODEC, WIDTH, PADDED, IS_MASKED)
    scale, low = load_scales(scale_at, wanted, CODEC, IS_MASKED)
    return data, scale, low


@triton.jit
def unpacked(x, CODEC: tl.constexpr, IS_ASSEMBLY: tl.constexpr = False):
    """Takes the numbers out of data of int3 and int2, int8 `[BLOCK_N, PADDED]`; others are as they are."""
    if CODEC == "int3":
        first, second, signs = x
        return numbers_of_levels(first, second, signs, IS_ASSEMBLY)
    elif CODEC == "int2":
        before, last, pairs = x
        return numbers_of_string(before, last, pairs)
    else:
        return x


@triton.jit
def decoded(data, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Converts data of a codec other than int4 to numbers that are still to be multiplied by their scale."""
    x = unpacked(data, CODEC)
    if CODEC == "fp8":
        return x.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def low_nibbles(x, DTYPE: tl.constexpr):
    """Takes the first halves out of rows of int4."""
    return (x & 0xF).to(tl.int8).to(DTYPE)


@triton.jit
def high_nibbles(x, DTYPE: tl.constexpr):
    """Takes the second halves out of rows of int4."""
    return (x >> 4).to(tl.int8).to(DTYPE)
