"""Numbers as two digits that multiply codes: `(high + low / 128) * step`, where `step` is the row's.

Those that multiply integers are integers, 16 bits in all. Those of 8-bit floats are float16. A tile of a product has 16
rows, which are the two digits of 8 numbers: row r + 8 holds the low digit of row r, in the same thread.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.bits.parts import in_parts, parts_of
from hfkv.kernels.triton.numbers import rotate, round_half_even

# A number so large that 23 bits of mantissa end at the ones: those are the last bits of what is added to it.
MAGIC = tl.constexpr(12582912.0)
# $0 and $1 are the low and the high nibbles of the four bytes in $2.
NIBBLES = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")
# Rows of a product, and numbers in them.
ROWS = tl.constexpr(16)
NUMBERS = tl.constexpr(8)


@triton.jit
def number_of_row(TILES: tl.constexpr):
    """Gives of each row of TILES tiles the number whose digit it holds, and whether that is the low one."""
    row = tl.arange(0, TILES * ROWS)
    return row // ROWS * NUMBERS + row % NUMBERS, row % ROWS >= NUMBERS


@triton.jit
def load_query_digits(
    ptr,
    rows,
    is_row,
    factor,
    CODEC: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    D_PADDED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Loads queries as digits, WIDTH (padded: PADDED) of them for D (padded: D_PADDED) numbers.

    Args:
        ptr: the queries.
        rows: int64 `[16 TILES]`, where the query of each row of the product begins; see `number_of_row`.
        is_row: `[16 TILES]`.
        factor: what scores are multiplied by.

    Returns:
        Digits `[16 TILES, PADDED]` twice: of int4 the factors of low and of high nibbles, else only the first
        is to be used; float32 `[8 TILES]` twice: what sums of digits are multiplied by, and the sums of the queries'
        numbers, in units of that.
    """
    d = tl.arange(0, D_PADDED)
    q = tl.load(ptr + rows[:, None] + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    q = q.to(tl.float32) * factor
    PARTS: tl.constexpr = parts_of(CODEC)  # noqa: N806
    if (CODEC == "int4") | (PARTS > 1):
        # Data stay rotated, so the query is rotated as well.
        q = rotate(q, TILES * ROWS, D_PADDED, BLOCK, LOG_BLOCK)
        q = tl.where((d < D)[None, :], q, 0.0)
    # NaN and infinities have no digits: they become the NaN of every score.
    step = tl.maximum(tl.max(tl.abs(q), 1) * (1.0 / 127.0), 1e-28) + tl.sum(q * 0.0, 1)
    q = q / step[:, None]
    q = tl.where(q == q, q, 0.0)
    high = q.to(tl.float16).to(tl.float32) if CODEC == "fp8" else round_half_even(q)
    low = (q - high) * 128.0
    if CODEC != "fp8":
        low = round_half_even(low)
    total = tl.sum(high * 128.0 + low, 1)
    _, is_low = number_of_row(TILES)
    if PARTS > 1:
        high = in_parts(high, PARTS, D, TILES * ROWS, D_PADDED, PADDED)
        low = in_parts(low, PARTS, D, TILES * ROWS, D_PADDED, PADDED)
    digits = tl.where(is_low[:, None], low, high)
    second = digits
    if CODEC == "int4":
        # The halves that the nibbles hold.
        column = tl.arange(0, PADDED)
        at_low = tl.broadcast_to(column[None, :], (TILES * ROWS, PADDED))
        at_high = tl.broadcast_to(tl.minimum(column + WIDTH, D_PADDED - 1)[None, :], (TILES * ROWS, PADDED))
        second = tl.where((column < D - WIDTH)[None, :], tl.gather(digits, at_high, 1), 0.0)
        digits = tl.where((column < WIDTH)[None, :], tl.gather(digits, at_low, 1), 0.0)
    digits = digits.to(tl.float16) if CODEC == "fp8" else digits.to(tl.int8)
    return digits, second.to(tl.int8), of_numbers(step, TILES) * (1.0 / 128.0), of_numbers(total, TILES)


@triton.jit
def of_numbers(x, TILES: tl.constexpr):
    """Takes `[8 TILES]` out of `[16 TILES]` that are the same for both digits of a number."""
    return tl.reshape(tl.max(tl.reshape(x, (TILES, 2, NUMBERS)), 1), (TILES * NUMBERS,))


@triton.jit
def summed(x, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Makes `[16 TILES, WIDTH]` products of digits float32 `[8 TILES, WIDTH]`, 128 times what they stand for."""
    weight = tl.where(tl.arange(0, 2) == 0, 128, 1).to(x.dtype)
    if TILES == 1:
        x = tl.sum(tl.reshape(x, (2, NUMBERS, WIDTH)) * weight[:, None, None], 0)
    else:
        x = tl.sum(tl.reshape(x, (TILES, 2, NUMBERS, WIDTH)) * weight[None, :, None, None], 1)
        x = tl.reshape(x, (TILES * NUMBERS, WIDTH))
    return x.to(tl.float32)


@triton.jit
def digits_of(x, CODEC: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """Writes float32 `[8 TILES, WIDTH]` of magnitudes up to 127 as digits `[16 TILES, WIDTH]`.

    Returns:
        The digits, and what integers stand for, 128 times the numbers.
    """
    if CODEC == "fp8":
        high = x.to(tl.float16)
        low = ((x - high.to(tl.float32)) * 128.0).to(tl.float16)
        rounded = x
    else:
        high = x + MAGIC
        ones = high - MAGIC
        low = (x - ones) * 128.0 + MAGIC
        rounded = ones * 128.0 + (low - MAGIC)
    # Not joined: tokens stay side by side in the registers of a thread.
    if TILES == 1:
        is_low = (tl.arange(0, 2) > 0)[:, None, None]
        both = tl.where(is_low, low[None, :, :], high[None, :, :])
    else:
        is_low = (tl.arange(0, 2) > 0)[None, :, None, None]
        low = tl.reshape(low, (TILES, 1, NUMBERS, WIDTH))
        both = tl.where(is_low, low, tl.reshape(high, (TILES, 1, NUMBERS, WIDTH)))
    if CODEC != "fp8":
        # The last byte of their bits is the integer.
        both = both.to(tl.int32, bitcast=True).to(tl.int8)
    return tl.reshape(both, (TILES * ROWS, WIDTH)), rounded


@triton.jit
def nibbles(x, IS_ASSEMBLY: tl.constexpr):
    """Takes both numbers out of each byte: int8 of x's shape, the low nibbles and the high ones.

    Three 32-bit operations take eight numbers out of four bytes; what compilers make of the same on bytes goes byte by
    byte. Triton's interpreter knows no assembly.
    """
    if IS_ASSEMBLY:
        return tl.inline_asm_elementwise(
            NIBBLES,
            "=&r,=r,r",
            [x],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return (x & 0xF).to(tl.int8), (x >> 4).to(tl.int8)
