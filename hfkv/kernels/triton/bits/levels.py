"""The eight levels of int3, to the bits of `hfkv.codecs.int3`."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.bits.log_scale import best_scale, has_numbers, nearest_scale, row_sums, shifted, to_scales
from hfkv.kernels.triton.bits.parts import in_parts

DEVIATION = tl.constexpr(57.2)
# Where the second level begins, the third and the last.
SECOND, THIRD, LAST = tl.constexpr(28.5), tl.constexpr(60.0), tl.constexpr(100.0)


# The levels, a byte each.
POSITIVE, NEGATIVE = 0x7B4D2B0E, 0x85B3D5F2


def _look_up(is_odd: int) -> str:
    """Writes the assembly that reads 16 numbers, four of every other part, out of four bytes each of $4 and $5.

    Level and sign of two parts are the nibbles of a word, by which `prmt` looks up eight numbers.
    """
    lines = [".reg .b32 at, lower, upper;"]
    for pair in (0, 1):  # the parts 0 and 4, or 2 and 6, or those behind them
        left = 2 - is_odd - 2 * pair
        lines += [
            f"shr.u32 at, $4, {2 * pair};",
            "and.b32 at, at, 0x33333333;",
            f"shl.b32 upper, $5, {left};" if left > 0 else f"shr.u32 upper, $5, {-left};",
            "and.b32 upper, upper, 0x44444444;",
            "or.b32 at, at, upper;",
            f"prmt.b32 lower, {POSITIVE:#x}, {NEGATIVE:#x}, at;",
            "shr.u32 at, at, 16;",
            f"prmt.b32 upper, {POSITIVE:#x}, {NEGATIVE:#x}, at;",
            f"prmt.b32 ${pair}, lower, upper, 0x6420;",
            f"prmt.b32 ${pair + 2}, lower, upper, 0x7531;",
        ]
    return "{ " + " ".join(lines) + " }"


EVEN, ODD = tl.constexpr(_look_up(0)), tl.constexpr(_look_up(1))


@triton.jit
def magnitudes(codes):
    """Gives the magnitudes of codes 0 to 3, integers."""
    high = codes >> 1
    return codes * 29 + high * 5 + (codes & high) * 17 + 14


@triton.jit
def _tried(sizes, squares, scale, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Gives the codes of magnitudes under the scales of bytes, the scales that suit these, and what they cost."""
    step = to_scales(scale)[:, None]
    codes = (sizes >= step * SECOND).to(tl.int32) + (sizes >= step * THIRD).to(tl.int32)
    codes += (sizes >= step * LAST).to(tl.int32)
    numbers = tl.where((tl.arange(0, WIDTH) < D)[None, :], magnitudes(codes), 0).to(tl.float32)
    products = row_sums(sizes * numbers, ROWS, WIDTH)
    best, cost = best_scale(squares, products, row_sums(numbers * numbers, ROWS, WIDTH))
    return codes, best, cost


@triton.jit
def write_levels(y, rows, stride, scale_at, is_new, ptr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Stores rows `[ROWS, WIDTH]` that are rotated: two bits of each level, then signs, and the byte of the scale.

    Args:
        rows: int64 `[ROWS]`, where the bytes of each begin behind `ptr`, `stride` apart.
        scale_at: pointers `[ROWS]` to the scales.
        is_new: `[ROWS]`, which rows are stored.
    """
    sizes = tl.abs(y)
    squares = row_sums(y * y, ROWS, WIDTH)
    middle = nearest_scale(squares * (1.0 / (D * DEVIATION * DEVIATION)))
    codes = tl.zeros([ROWS, WIDTH], tl.int32)
    scale = middle
    least = tl.full([ROWS], float("inf"), tl.float32)
    for trial in tl.range(0, 5, num_stages=1):
        # The next one itself, one step below, one above, then two.
        tried = shifted(middle, (trial + 1) // 2 * (1 - trial % 2 * 2))
        other, its_scale, cost = _tried(sizes, squares, tried, D, ROWS, WIDTH)
        is_better = cost < least
        codes = tl.where(is_better[:, None], other, codes)
        scale = tl.where(is_better, its_scale, scale)
        least = tl.where(is_better, cost, least)
    is_there = has_numbers(middle)
    tl.store(scale_at, tl.where(is_there, scale, middle).to(tl.uint8), mask=is_new)

    of_part: tl.constexpr = (D + 7) // 8
    padded: tl.constexpr = 1 if WIDTH < 8 else WIDTH // 8
    is_number = is_there[:, None] & (tl.arange(0, WIDTH) < D)[None, :]
    codes = in_parts(tl.where(is_number, codes, 0), 8, D, ROWS, WIDTH, 8 * padded)
    signs = in_parts(tl.where(is_number & (y < 0.0), 1, 0), 8, D, ROWS, WIDTH, 8 * padded)
    byte = tl.arange(0, padded).to(tl.int64)
    valid = is_new[:, None] & (byte < of_part)[None, :]
    at = ptr + rows[:, None] + byte[None, :] * stride
    # Parts in pairs, of which each has bits in bytes of its own.
    shifts = (tl.arange(0, 4) * 2)[None, :, None, None]
    pairs = tl.sum(tl.reshape(codes, (ROWS, 4, 2, padded)) << shifts, 1)
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    tl.store(at, first.to(tl.uint8), mask=valid)
    tl.store(at + of_part * stride, second.to(tl.uint8), mask=valid)
    bits = tl.sum(tl.reshape(signs, (ROWS, 8, padded)) << tl.arange(0, 8)[None, :, None], 1)
    tl.store(at + 2 * of_part * stride, bits.to(tl.uint8), mask=valid)


@triton.jit
def parts_of_levels(levels, signs, ASSEMBLY: tl.constexpr):
    """Reads four parts, EVEN or ODD, int8 of the shape of the bytes."""
    return tl.inline_asm_elementwise(
        ASSEMBLY,
        "=&r,=&r,=&r,=&r,r,r",
        [levels, signs],
        dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def joined_levels(even, odd, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Puts four even parts and four odd ones side by side: `[ROWS, PADDED]`."""
    a, c, e, g = even
    b, d, f, h = odd
    evens = tl.join(tl.join(a, e), tl.join(c, g))
    both = tl.join(evens, tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(tl.permute(both, (0, 2, 3, 4, 1)), (ROWS, PADDED))


@triton.jit
def numbers_of_levels(first, second, signs, IS_ASSEMBLY: tl.constexpr):
    """Reads rows of int3 as numbers, int8 `[N, 8 n]`.

    Args:
        first, second: bytes of levels `[N, n]`, of even parts and of odd ones.
        signs: bytes of signs `[N, n]`.
        IS_ASSEMBLY: whether there is assembly, which Triton's interpreter does not know.
    """
    rows: tl.constexpr = first.shape[0]
    padded: tl.constexpr = first.shape[1]
    if IS_ASSEMBLY:
        even, odd = parts_of_levels(first, signs, EVEN), parts_of_levels(second, signs, ODD)
        return joined_levels(even, odd, rows, 8 * padded)
    else:
        pairs = tl.permute(tl.join(first, second), (0, 2, 1)).to(tl.int32)[:, None, :, :]
        codes = (pairs >> (tl.arange(0, 4) * 2)[None, :, None, None]) & 3
        codes = tl.reshape(codes, (rows, 8, padded))
        sign = (signs.to(tl.int32)[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
        return tl.reshape((magnitudes(codes) ^ -sign) + sign, (rows, 8 * padded)).to(tl.int8)
