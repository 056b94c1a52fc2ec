"""What scores lack of keys that were written less their mean, where products are of digits."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.triton.digits.numbers import number_of_row, of_numbers, summed
from hfkv.kernels.triton.mean.scores import lacking


@triton.jit
def in_digits(factors, queries, TILES: tl.constexpr):
    """Takes what `load_factors` gives of each row of a product for `add_mean`.

    As exact as cosines and sines are, c and s are one digit: in the rows of low ones they are zero.

    Args:
        factors: what `load_factors` gives of rows `[16 TILES]`.
        queries: what `load_query_digits` gives.

    Returns:
        c and s `[16 TILES, PADDED]`, and in units of the queries' the others, `[8 TILES]`.
    """
    c, s, size, rest = factors
    _, _, factor, _ = queries
    _, is_low = number_of_row(TILES)
    c, s = tl.where(is_low[:, None], 0.0, c), tl.where(is_low[:, None], 0.0, s)
    return c, s, of_numbers(size, TILES) / (factor * 128.0), of_numbers(rest, TILES) / factor


@triton.jit
def add_mean(scores, c, s, waves, factors, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds to scores `[8 TILES, BLOCK_N]` what they lack; see `hfkv.kernels.triton.mean.scores.add_mean`."""
    _, _, size, rest = factors
    return scores + (summed(lacking(c, s, waves), TILES, BLOCK_N) * size[:, None] + rest[:, None])
