"""Products of digits: scores of a tile, the weights of a running softmax, and the sums of values.

Sums over the tokens of a tile that only the end needs are kept for each of its BLOCK_N places.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.bits.levels import EVEN, ODD, joined_levels, parts_of_levels
from hfkv.kernels.triton.bits.log_scale import ONE, to_scales
from hfkv.kernels.triton.digits.numbers import NUMBERS, digits_of, nibbles, summed
from hfkv.kernels.triton.numbers import tanh
from hfkv.kernels.triton.products import LOG2_E
from hfkv.kernels.triton.products import store_split as store_floats
from hfkv.kernels.triton.tokens import unpacked


@triton.constexpr_function
def loaded_together(codec):
    """Gives how many tokens' scales are loaded at once where nothing is masked: four bytes of them."""
    return {"int4": 1, "int3": 4, "int2": 4}.get(codec, 2)


@triton.jit
def load_scales(ptr, row, place, more, wanted, CODEC: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr):
    """Loads float32 `[BLOCK_N]` scales, and the offsets of int4, which lie side by side.

    Where nothing is masked, scales are loaded two at a time: fewer than four bytes cannot be on their way while others
    are computed with.

    Args:
        ptr: a plane of bfloat16, or of bytes, four of which are loaded at a time.
        row: where a row or page begins, int64.
        place, more: the place of the tokens in it, and how far behind, as `locate` or `locate_inside` give them, the
            latter of every `loaded_together` so many.
        wanted: `[BLOCK_N]`; those of others are one and zero, whatever lies there.
    """
    if CODEC == "int4":
        at = ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + ((row >> 1) + place) + more
        # A scale of one in the lower half.
        both = tl.load(at, mask=wanted, other=0x3F80) if IS_MASKED else tl.load(at)
        return (both << 16).to(tl.float32, bitcast=True), (both & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif (CODEC == "int3") | (CODEC == "int2"):
        if IS_MASKED:
            byte = tl.load(ptr + (row + place) + more, mask=wanted, other=ONE)
        else:
            four = tl.load(ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + ((row + place) >> 2) + (more >> 2))
            byte = tl.reshape(tl.join(tl.join(four, four >> 16), tl.join(four >> 8, four >> 24)), (BLOCK_N,)) & 0xFF
        scale = to_scales(byte.to(tl.int32))
        return scale, scale
    elif IS_MASKED:
        scale = tl.load(ptr + (row + place) + more, mask=wanted, other=1.0).to(tl.float32)
        return scale, scale
    else:
        two = tl.load(ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + ((row + place) >> 1) + (more >> 1))
        scale = tl.reshape(tl.join(two << 16, two & 0xFFFF0000), (BLOCK_N,)).to(tl.float32, bitcast=True)
        return scale, scale


@triton.jit
def product(digits, codes, CODEC: tl.constexpr):
    """Multiplies digits by codes of int8, which are summed exactly, or of fp8."""
    if CODEC == "fp8":
        return tl.dot(digits, codes.to(tl.float8e4nv, bitcast=True).to(tl.float16))
    else:
        return tl.dot(digits, codes, out_dtype=tl.int32)


@triton.jit
def scores_of(
    queries,
    codes,
    scales,
    CODEC: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_ASSEMBLY: tl.constexpr,
):
    """Multiplies queries by keys: float32 `[BLOCK_M, BLOCK_N]`, in the queries' units.

    Args:
        queries: what `load_query_digits` gives.
        codes, scales: what `load_codes` and `load_scales` give.
    """
    q, q_high, _, q_sum = queries
    scale, low = scales
    if CODEC == "int4":
        lower, upper = nibbles(codes, IS_ASSEMBLY)
        scores = tl.dot(q, tl.trans(lower), out_dtype=tl.int32)
        scores = tl.dot(q_high, tl.trans(upper), scores, out_dtype=tl.int32)
        scores = summed(scores, TILES, BLOCK_N) * scale[None, :] + q_sum[:, None] * low[None, :]
    else:
        codes = tl.trans(unpacked(codes, CODEC, IS_ASSEMBLY))
        scores = summed(product(q, codes, CODEC), TILES, BLOCK_N) * scale[None, :]
    return scores


@triton.jit
def capped(scores, queries, softcap, HAS_SOFTCAP: tl.constexpr):
    """Caps scores, where they are: those are, times `exponent_factor`, the exponents of two."""
    if HAS_SOFTCAP:
        _, _, factor, _ = queries
        scores = (softcap * LOG2_E) * tanh(scores * (factor / softcap)[:, None])
    return scores


@triton.jit
def query_factor(scale, HAS_SOFTCAP: tl.constexpr):
    """Gives what queries are multiplied by: scores are exponents of two, except before a softcap."""
    if HAS_SOFTCAP:
        return scale
    else:
        return scale * LOG2_E


@triton.jit
def exponent_factor(queries, HAS_SOFTCAP: tl.constexpr):
    """Gives what the scores of each row, above zero, are multiplied by to be exponents of two `[BLOCK_M]`."""
    _, _, factor, _ = queries
    if HAS_SOFTCAP:
        return tl.full(factor.shape, 1.0, tl.float32)
    else:
        return factor


@triton.jit
def empty_softmax(
    sinks_ptr, head, split, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SINKS: tl.constexpr
):
    """Begins a running softmax, in split 0 with the sink logits of the heads.

    Returns:
        The highest score so far `[BLOCK_M]`, and the sums of weights `[BLOCK_M, BLOCK_N]`.
    """
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_SINKS:
        highest = tl.where(split == 0, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E / factor, highest)
        total = tl.where((tl.arange(0, BLOCK_N) == 0)[None, :] & (split == 0), 1.0, total)
    return highest, total


@triton.jit
def soft_weights(scores, visible, softmax, factor, IS_MASKED: tl.constexpr):
    """Takes the next step of a running softmax, in powers of two.

    Args:
        scores: float32 `[BLOCK_M, BLOCK_N]`.
        visible: a mask of the same shape; not looked at unless IS_MASKED, when everybody sees all.
        softmax: what `empty_softmax` or the step before gave.
        factor: what `exponent_factor` gives.

    Returns:
        `softmax`, the weights `[BLOCK_M, BLOCK_N]`, and the factor `[BLOCK_M]` on what was summed so far.
    """
    before, total = softmax
    if IS_MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(before, tl.max(scores, 1))
    finite = highest
    if IS_MASKED:
        # Of a row that has seen nothing yet both are -inf, whose difference is none.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores * factor[:, None] - (finite * factor)[:, None])
    decay = tl.exp2((before - finite) * factor)
    return (highest, total * decay[:, None] + p), p, decay


@triton.jit
def empty_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr, CODEC: tl.constexpr):
    """Begins the sums of `add_values`: of int4 both halves of a value, and weights times offsets."""
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    acc_high = tl.zeros([BLOCK_M, PADDED], tl.float32)
    offset = tl.zeros([BLOCK_M if CODEC == "int4" else 1, BLOCK_N], tl.float32)
    return acc, acc_high, offset


@triton.jit
def _times_parts(digits, parts, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Multiplies digits by four parts of values: what bytes hold then stays where they are loaded to."""
    a, b, c, d = parts
    return (
        summed(product(digits, a, "int8"), TILES, WIDTH),
        summed(product(digits, b, "int8"), TILES, WIDTH),
        summed(product(digits, c, "int8"), TILES, WIDTH),
        summed(product(digits, d, "int8"), TILES, WIDTH),
    )


@triton.jit
def add_values(
    sums,
    p,
    decay,
    codes,
    scales,
    CODEC: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    IS_ASSEMBLY: tl.constexpr,
):
    """Multiplies the sums so far by `decay`, and adds weights `p` times a tile of values.

    Weights times scales are digits of the tile's own largest: one that is large elsewhere rounds none of them away.

    Returns:
        `sums`, as `empty_sums` begins them.
    """
    acc, acc_high, offset = sums
    scale, low = scales
    weights = p * scale[None, :]
    # Bits of numbers that are not below zero are in the numbers' order, and those of NaN, which a maximum of floats
    # passes over, above them.
    largest = tl.max(weights.to(tl.uint32, bitcast=True), 1).to(tl.float32, bitcast=True)
    digits, rounded = digits_of(weights * (127.0 / tl.maximum(largest, 1e-30))[:, None], CODEC, TILES, BLOCK_N)
    step = largest * (1.0 / (128.0 * 127.0))
    if CODEC == "int4":
        lower, upper = nibbles(codes, IS_ASSEMBLY)
        added = summed(tl.dot(digits, lower, out_dtype=tl.int32), TILES, PADDED)
        acc = acc * decay[:, None] + added * step[:, None]
        added = summed(tl.dot(digits, upper, out_dtype=tl.int32), TILES, PADDED)
        acc_high = acc_high * decay[:, None] + added * step[:, None]
        # Of the rounded weights: their rounding then errs by their share of a value, not of its offset.
        offset = offset * decay[:, None] + rounded * ((low / scale)[None, :] * step[:, None])
    else:
        if (CODEC == "int3") & IS_ASSEMBLY:
            first, second, signs = codes
            even = _times_parts(digits, parts_of_levels(first, signs, EVEN), TILES, PADDED // 8)
            odd = _times_parts(digits, parts_of_levels(second, signs, ODD), TILES, PADDED // 8)
            added = joined_levels(even, odd, TILES * NUMBERS, PADDED)
        else:
            added = summed(product(digits, unpacked(codes, CODEC, IS_ASSEMBLY), CODEC), TILES, PADDED)
        acc = acc * decay[:, None] + added * step[:, None]
    return acc, acc_high, offset


@triton.jit
def store_split(
    out_ptr,
    lse_ptr,
    rows,
    is_row,
    sums,
    softmax,
    factor,
    CODEC: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Stores one split's output `[.., D]`, rotated as the values are, and its log-sum-exp at `rows`, int64."""
    highest, total = softmax
    acc, acc_high, offset = sums
    store_floats(
        *(out_ptr, lse_ptr, rows, is_row, acc, acc_high, tl.sum(offset, 1), highest * factor, tl.sum(total, 1)),
        *(CODEC, D, WIDTH, PADDED),
    )
