"""Rows in parts: an eighth of the numbers of int3, or a quarter of those of int2, has bits of its own in each byte.

Part `p` of a row of D numbers is the numbers from `p ⌈D / PARTS⌉` on. In tiles parts are padded to powers of two, and
number `i` of part `p` is column `p PADDED / PARTS + i`.
"""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import torch
import triton
import triton.language as tl

BITS = ("int3", "int2")


def rows_together(device: torch.device) -> int:
    """Rows that a program writes: one, by one warp, as numbers of a row wait for each other; interpreted, many."""
    return 1 if device.type == "cuda" else 16


@triton.constexpr_function
def parts_of(codec):
    """Gives the parts of a row, 1 where a codec writes numbers whole."""
    return {"int3": 8, "int2": 4}.get(codec, 1)


@triton.jit
def number_of_column(PARTS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Gives of each column `[PADDED]` the number that it holds, and whether it holds any."""
    column = tl.arange(0, PADDED)
    if (PARTS == 1) | (D == PADDED):
        return column, column < D
    else:
        OF_PART: tl.constexpr = (D + PARTS - 1) // PARTS  # noqa: N806
        place = column % (PADDED // PARTS)
        number = column // (PADDED // PARTS) * OF_PART + place
        return number, (place < OF_PART) & (number < D)


@triton.jit
def in_parts(x, PARTS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Puts rows `[ROWS, WIDTH]` of D numbers in parts `[ROWS, PADDED]`, zeros where there are none."""
    if (WIDTH == PADDED) & ((PARTS == 1) | (D == WIDTH)):
        return x
    else:
        number, is_number = number_of_column(PARTS, D, PADDED)
        at = tl.broadcast_to(tl.where(is_number, number, 0)[None, :], (ROWS, PADDED))
        return tl.where(is_number[None, :], tl.gather(x, at, 1), 0)
