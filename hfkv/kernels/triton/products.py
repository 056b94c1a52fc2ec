"""Products of the attention kernels: scores of a tile, the weights of a running softmax, and the sums of values.

Data are multiplied as they are stored, and the products by the scales.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.bits.parts import in_parts, number_of_column, parts_of
from hfkv.kernels.triton.numbers import cast, rotate, round_tf32, tanh
from hfkv.kernels.triton.tokens import decoded, high_nibbles, low_nibbles

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_query(
    ptr,
    rows,
    is_row,
    CODEC: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    D_PADDED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads queries as factors of the data of CODEC, WIDTH (padded: PADDED) of them for D (padded: D_PADDED) numbers.

    Args:
        ptr: the queries.
        rows: int64 `[BLOCK_M]`, where each begins.
        is_row: `[BLOCK_M]`.

    Returns:
        What `products` takes, `[BLOCK_M, PADDED]` of DTYPE twice and float32 `[BLOCK_M]`: of int4 the factors of low
        nibbles, those of high ones, and the sums of both, that offsets are multiplied by; of other codecs only the
        first is to be used.
    """
    d = tl.arange(0, D_PADDED)
    q = tl.load(ptr + rows[:, None] + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0).to(DTYPE)
    q_high = q
    q_sum = tl.zeros([BLOCK_M], tl.float32)
    PARTS: tl.constexpr = parts_of(CODEC)  # noqa: N806
    if PARTS > 1:
        rotated = rotate(q.to(tl.float32), BLOCK_M, D_PADDED, BLOCK, LOG_BLOCK)
        q = cast(in_parts(rotated, PARTS, D, BLOCK_M, D_PADDED, PADDED), DTYPE)
    elif CODEC == "int4":
        # Data stay rotated, so the query is rotated as well, and cut into the halves that the nibbles hold.
        rotated = rotate(q.to(tl.float32), BLOCK_M, D_PADDED, BLOCK, LOG_BLOCK)
        column = tl.arange(0, PADDED)
        at_low = tl.broadcast_to(column[None, :], (BLOCK_M, PADDED))
        at_high = tl.broadcast_to(tl.minimum(column + WIDTH, D_PADDED - 1)[None, :], (BLOCK_M, PADDED))
        q = cast(tl.where((column < WIDTH)[None, :], tl.gather(rotated, at_low, 1), 0.0), DTYPE)
        q_high = cast(tl.where((column < D - WIDTH)[None, :], tl.gather(rotated, at_high, 1), 0.0), DTYPE)
        # Of what the products see, so that the rounding of q cancels in q * scale + low.
        q_sum = tl.sum(q.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)
    return q, q_high, q_sum


@triton.jit
def products(queries, tokens, CODEC: tl.constexpr, DTYPE: tl.constexpr):
    """Multiplies queries by keys, as `load_query` and `load_tokens` give them: float32 `[BLOCK_M, BLOCK_N]`."""
    q, q_high, q_sum = queries
    data, scale, low = tokens
    if CODEC == "int4":
        scores = tl.dot(q, tl.trans(low_nibbles(data, DTYPE)), input_precision="ieee")
        scores = tl.dot(q_high, tl.trans(high_nibbles(data, DTYPE)), scores, input_precision="ieee")
        scores = scores * scale[None, :] + q_sum[:, None] * low[None, :]
    else:
        scores = tl.dot(q, tl.trans(decoded(data, CODEC, DTYPE)), input_precision="ieee")
        if CODEC != "none":
            scores = scores * scale[None, :]
    return scores


@triton.jit
def empty_softmax(sinks_ptr, head, split, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Begins a running softmax, in split 0 with the sink logits of the heads.

    Returns:
        `highest` and `total`, float32 `[BLOCK_M]`.
    """
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        highest = tl.where(split == 0, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E, highest)
        total = tl.where(split == 0, 1.0, total)
    return highest, total


@triton.jit
def soft_weights(
    scores, visible, highest, total, scale, softcap, HAS_SOFTCAP: tl.constexpr, IS_MASKED: tl.constexpr = True
):
    """Takes the next step of a running softmax, in powers of two.

    Args:
        scores: float32 `[BLOCK_M, BLOCK_N]`.
        visible: a mask of the same shape; not looked at unless IS_MASKED, when everybody sees all.
        highest, total: the largest score so far, and the sum of weights.
        scale, softcap: factor on scores and the bound of a tanh on them.

    Returns:
        The weights `[BLOCK_M, BLOCK_N]`, the factor `[BLOCK_M]` on what was summed so far, `highest` and `total`.
    """
    scores = softcap * LOG2_E * tanh(scores * scale / softcap) if HAS_SOFTCAP else scores * (scale * LOG2_E)
    if IS_MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    before = highest
    highest = tl.maximum(before, tl.max(scores, 1))
    finite = highest
    if IS_MASKED:
        # Of a row that has seen nothing yet both are -inf, whose difference is none.
        finite = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(before - finite)
    return p, decay, highest, total * decay + tl.sum(p, 1)


@triton.jit
def empty_sums(BLOCK_M: tl.constexpr, PADDED: tl.constexpr):
    """Begins `acc`, `acc_high` and `offset` of `add_values`."""
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    acc_high = tl.zeros([BLOCK_M, PADDED], tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)
    return acc, acc_high, offset


@triton.jit
def add_values(
    acc, acc_high, offset, p, decay, tokens, CODEC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):
    """Multiplies the sums so far by `decay`, and adds weights `p` times a tile of values, as `load_tokens` gives them.

    Returns:
        `acc` and, of int4's high nibbles, `acc_high`, both `[BLOCK_M, PADDED]`, and `offset` `[BLOCK_M]`; float32.
    """
    data, scale, low = tokens
    acc = acc * decay[:, None]
    if CODEC != "none":
        p = p * scale[None, :]
    if PRECISION == "tf32":
        p = round_tf32(p)
    p = p.to(DTYPE)
    if CODEC == "int4":
        acc = tl.dot(p, low_nibbles(data, DTYPE), acc, input_precision=PRECISION)
        acc_high = acc_high * decay[:, None]
        acc_high = tl.dot(p, high_nibbles(data, DTYPE), acc_high, input_precision=PRECISION)
        # Of the rounded weights: their rounding then errs by their share of a value, not of its offset.
        offset = offset * decay + tl.sum(p.to(tl.float32) * (low / scale)[None, :], 1)
    else:
        acc = tl.dot(p, decoded(data, CODEC, DTYPE), acc, input_precision=PRECISION)
    return acc, acc_high, offset


@triton.jit
def store_split(
    out_ptr,
    lse_ptr,
    rows,
    is_row,
    acc,
    acc_high,
    offset,
    highest,
    total,
    CODEC: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Stores one split's output `[.., D]`, rotated as the values are, and its log-sum-exp at `rows`, int64."""
    is_empty = total == 0.0
    share = 1.0 / tl.where(is_empty, 1.0, total)
    d, is_number = number_of_column(parts_of(CODEC), WIDTH if CODEC == "int4" else D, PADDED)
    out_at = out_ptr + rows[:, None] * D + d[None, :]
    out = (acc + offset[:, None]) * share[:, None]
    tl.store(out_at, cast(out, out_ptr.dtype.element_ty), mask=is_row[:, None] & is_number[None, :])
    if CODEC == "int4":
        out = (acc_high + offset[:, None]) * share[:, None]
        valid = is_row[:, None] & (d < D - WIDTH)[None, :]
        tl.store(out_at + WIDTH, cast(out, out_ptr.dtype.element_ty), mask=valid)
    lse = tl.where(is_empty, float("-inf"), (highest + tl.log2(tl.where(is_empty, 1.0, total))) * LN_2)
    tl.store(lse_ptr + rows, lse, mask=is_row)
