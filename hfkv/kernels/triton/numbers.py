"""Arithmetic the kernels share: roundings that are the same bits on every machine, and the Hadamard rotation."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import functools

import triton
import triton.language as tl

from hfkv.codecs.hadamard import hadamard_block


@triton.jit
def round_half_even(x):
    """Rounds magnitudes below 2^22 to the nearest integer, halves to the even one.

    1.5 x 2^23 leaves no bits for a fraction.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_bf16(x):
    """Rounds float32 to the nearest bfloat16, and keeps it as float32.

    On the bits, because Triton's interpreter truncates where a GPU rounds.
    """
    bits = x.to(tl.uint32, bitcast=True)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def round_tf32(x):
    """Rounds float32 to the 10 bits of mantissa that tensor cores read, which would cut off the rest."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) << 13
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Rounds float32 to the nearest number of DTYPE."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = round_bf16(x).to(tl.uint32, bitcast=True) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def tanh(x):
    """Computes the hyperbolic tangent, without the library function that the interpreter lacks."""
    small = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    return tl.where(x < 0.0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)


@triton.jit
def fp8_bits(x):
    """Rounds float32 of magnitudes up to 448 to the nearest float8_e4m3fn, and gives its bits."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_subnormal = magnitude < 0x3C800000  # 2^-6
    # Three bits of mantissa are left, and an exponent biased by 7 instead of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below them the numbers lie 2^-9 apart.
    subnormal = round_half_even(tl.where(is_subnormal, tl.abs(x) * 512.0, 0.0)).to(tl.uint32)
    rounded = tl.where(is_subnormal, subnormal, normal)
    rounded = tl.where(x == x, rounded, 0x7F)
    return (rounded | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def rotate(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr):
    """Rotates `[ROWS, WIDTH]` float32 in blocks of BLOCK = 2^LOG_BLOCK, to the bits of `hfkv.codecs.hadamard`."""
    for stage in tl.static_range(LOG_BLOCK):
        pairs = tl.reshape(x, (ROWS, WIDTH >> (stage + 1), 2, 1 << stage))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
        x = tl.reshape(pairs, (ROWS, WIDTH))
    return x * (BLOCK**-0.5)


@functools.cache
def rotation(head_dim: int) -> tuple[int, int]:
    """Gives BLOCK and LOG_BLOCK of `rotate` for rows of `head_dim` numbers."""
    block = hadamard_block(head_dim)
    return block, block.bit_length() - 1
