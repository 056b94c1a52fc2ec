"""Scales of eight bits, to the bits of `hfkv.codecs.log_scale`."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

# The byte of a scale of one.
ONE = tl.constexpr(168)
# The seven bits of mantissa behind the exponent, a byte each: of the first four steps of an octave, and of the others.
FIRST, OTHERS = tl.constexpr(0x26180C00), tl.constexpr(0x6B574535)
# What an error along a row costs more than one across it.
ALONG = tl.constexpr(16.0)


@triton.jit
def to_scales(byte):
    """Gives the scales that bytes, int32, stand for, as float32."""
    mantissa = (tl.where((byte & 4) == 0, FIRST, OTHERS) >> ((byte & 3) * 8)) & 0xFF
    scale = ((((byte >> 3) + 106) << 23) | (mantissa << 16)).to(tl.float32, bitcast=True)
    return tl.where(byte == 0, 0.0, tl.where(byte == 255, float("nan"), scale))


@triton.jit
def nearest_scale(squares):
    """Gives the bytes, int32, of the scales next to the roots of `squares`, float32."""
    bits = squares.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rest = bits & 0x7FFFFF
    steps = (bits >> 23) * 4 + (rest >= 0xB95C2).to(tl.int32) + (rest >= 0x25FED7).to(tl.int32)
    steps += (rest >= 0x45672A).to(tl.int32) + (rest >= 0x6AC0C7).to(tl.int32)
    return tl.minimum(tl.maximum(steps - 340, 0), 255)


@triton.jit
def shifted(byte, by):
    """Gives the bytes of scales so many steps away, as far as there are any."""
    return tl.minimum(tl.maximum(byte + by, 1), 254)


@triton.jit
def has_numbers(byte):
    """Says which rows have codes at all, by the bytes of their scales."""
    return (byte > 0) & (byte < 255)


@triton.jit
def row_sums(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums rows `[ROWS, WIDTH]` of up to 1,024 numbers: the second half is added to the first one, and so on."""
    for stage in tl.static_range(10):
        if (WIDTH >> stage) > 1:
            halves = tl.permute(tl.reshape(x, (ROWS, 2, WIDTH >> (stage + 1))), (0, 2, 1))
            first, second = tl.split(halves)
            x = first + second
    return tl.reshape(x, (ROWS,))


@triton.jit
def best_scale(squares, products, of_codes):
    """Gives the scale that suits the codes of a row, and what it costs; see `hfkv.codecs.log_scale.best_scale`."""
    along = tl.div_rn(products * products, squares) * ALONG
    scale = tl.div_rn(products * (1.0 + ALONG), of_codes + along)
    byte = shifted(nearest_scale(scale * scale), 0)
    scale = to_scales(byte)
    share = tl.div_rn(scale * products, squares)
    missing = share - 1.0
    return byte, tl.div_rn(scale * scale * of_codes, squares) - share * 2.0 + missing * missing * ALONG
