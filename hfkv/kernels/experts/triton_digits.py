"""Products of int4 codes as they are stored: a row of x in digits of eight bits, times bytes four at a time.

Sums of products are exact integers. A number of x errs by at most 2^-16 of the largest in its group of 32, where
weights that are decoded to half precision first err by 2^-9 or 2^-12 of themselves.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

# What the largest number of a group becomes: a signed byte and an unsigned one behind it.
LARGEST = tl.constexpr(127.0 * 256.0)
# Smaller groups are zeros: their factor would not be finite.
SMALLEST = tl.constexpr(2.0**-110)
# 1.5 x 2^23 leaves no bits for a fraction: what is added to it stands rounded in the lowest bits of the sum.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _digits(x, factor):
    """Rounds x * factor to 16 bits, the lowest ones of an int32."""
    return (x * factor + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def _packed(a, b, c, d):
    """Puts the high and the low bytes of four numbers of 16 bits into a word each, the first number's lowest."""
    high = ((a >> 8) & 0xFF) | (b & 0xFF00) | ((c & 0xFF00) << 8) | ((d & 0xFF00) << 16)
    low = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | ((d & 0xFF) << 24)
    return high, low


@triton.jit
def _load4(x_ptr, x_k, at, K: tl.constexpr, WORDS: tl.constexpr):
    """Loads x at `at` and the three behind it, zeros behind its K numbers; float32."""
    behind = at[:, None] + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + behind * x_k, mask=behind < K, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (WORDS, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_digits(x_ptr, x_k, word, K: tl.constexpr, WORDS: tl.constexpr):
    """Loads the numbers of x that belong to words of four bytes of int4, in digits.

    Args:
        x_ptr, x_k: the row of x and its stride.
        word: int32 `[WORDS]`, the words' places in a row; a group of 32 inputs is four of them.

    Returns:
        Words of signed high digits and of unsigned low ones, for low nibbles and then for high ones, each int32
        `[WORDS]`; float32 `[WORDS / 4]`, the unit of each group's digits and the sum of its x.
    """
    at = word // 4 * 32 + word % 4 * 4
    a, b, c, d = _load4(x_ptr, x_k, at, K, WORDS)
    p, q, r, s = _load4(x_ptr, x_k, at + 16, K, WORDS)
    largest = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    largest = tl.maximum(largest, tl.maximum(tl.maximum(tl.abs(p), tl.abs(q)), tl.maximum(tl.abs(r), tl.abs(s))))
    largest = tl.max(tl.reshape(largest, (WORDS // 4, 4)), 1)
    sums = tl.sum(tl.reshape(((a + b) + (c + d)) + ((p + q) + (r + s)), (WORDS // 4, 4)), 1)
    factor = tl.where(largest > SMALLEST, LARGEST / tl.maximum(largest, SMALLEST), 0.0)
    factor = tl.reshape(tl.broadcast_to(factor[:, None], (WORDS // 4, 4)), (WORDS,))
    low = _packed(_digits(a, factor), _digits(b, factor), _digits(c, factor), _digits(d, factor))
    high = _packed(_digits(p, factor), _digits(q, factor), _digits(r, factor), _digits(s, factor))
    return low[0], low[1], high[0], high[1], largest * (1.0 / LARGEST), sums


@triton.jit
def dot4(total, a, b, IS_SIGNED: tl.constexpr, HAS_ASSEMBLY: tl.constexpr):
    """Adds to int32 `total` the products of four unsigned bytes of `a` and four bytes of `b`, signed ones or not."""
    if HAS_ASSEMBLY:
        if IS_SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        for byte in tl.static_range(4):
            factor = (b << (24 - 8 * byte)) >> 24
            total += ((a >> (8 * byte)) & 0xFF) * (factor if IS_SIGNED else factor & 0xFF)
        return total


@triton.jit
def group_sums(w, digits, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, HAS_ASSEMBLY: tl.constexpr):
    """Adds up nibbles times digits of x: int32 `[BLOCK_N, WORDS / 4]`, to be multiplied by the digits' units.

    Args:
        w: words of four bytes, int32 `[BLOCK_N, WORDS]`.
        digits: the four tensors of words that `load_digits` gives.
    """
    low_signed, low_rest, high_signed, high_rest = digits
    low = w & 0x0F0F0F0F
    high = (w >> 4) & 0x0F0F0F0F
    sums = tl.zeros([BLOCK_N, WORDS], tl.int32)
    sums = dot4(sums, low, tl.broadcast_to(low_signed[None, :], (BLOCK_N, WORDS)), True, HAS_ASSEMBLY)
    sums = dot4(sums, high, tl.broadcast_to(high_signed[None, :], (BLOCK_N, WORDS)), True, HAS_ASSEMBLY) << 8
    sums = dot4(sums, low, tl.broadcast_to(low_rest[None, :], (BLOCK_N, WORDS)), False, HAS_ASSEMBLY)
    sums = dot4(sums, high, tl.broadcast_to(high_rest[None, :], (BLOCK_N, WORDS)), False, HAS_ASSEMBLY)
    return tl.sum(tl.reshape(sums, (BLOCK_N, WORDS // 4, 4)), 2)
