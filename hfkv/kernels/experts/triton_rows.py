"""Rows of expert matrices as both kernels read them: scales, int4's codes and units, outputs and biases."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_inputs(byte):
    """Gives the inputs that the low nibbles of a row's bytes belong to; high nibbles belong to inputs 16 behind."""
    return byte // 16 * 32 + byte % 16


@triton.jit
def codes_pointers(groups_ptr, e, g, n, num_rows, K: tl.constexpr):
    """Points at the two codes of groups `g` in rows `n` of expert `e`: `[BLOCK_N, groups]`."""
    num_groups: tl.constexpr = (K + 31) // 32
    return groups_ptr + (e * num_groups + g)[None, :] * num_rows + n[:, None]


@triton.jit
def split_codes(codes):
    """Splits the two codes of groups into the step's and the centre's, both float32."""
    return codes.to(tl.int8).to(tl.float32), (codes >> 8).to(tl.float32)


@triton.jit
def load_units(scale_ptr, e, n, is_n, num_rows):
    """Loads the units of steps and of centres in rows `n` of expert `e`, both float32 `[BLOCK_N]`."""
    units_at = scale_ptr + (e * num_rows + n) * 2
    step = tl.load(units_at, mask=is_n, other=0.0).to(tl.float32)
    return step, tl.load(units_at + 1, mask=is_n, other=0.0).to(tl.float32)


@triton.jit
def load_scale(scale_ptr, e, n, is_n, num_rows):
    """Loads int8's scales of rows `n` of expert `e`, float32 `[BLOCK_N]`."""
    return tl.load(scale_ptr + e * num_rows + n, mask=is_n, other=0.0)


@triton.jit
def load_columns(columns_ptr, e, n, is_n, num_rows):
    """Loads the outputs that rows `n` of expert `e` compute, int64 `[BLOCK_N]`."""
    if columns_ptr is None:
        return n
    else:
        return tl.load(columns_ptr + e * num_rows + n, mask=is_n, other=0).to(tl.int64)


@triton.jit
def load_bias(bias_ptr, bias_e, bias_n, e, column, is_n, is_added):
    """Loads what is added to outputs, float32 `[BLOCK_N]`: zeros unless `is_added`."""
    bias = tl.load(bias_ptr + e * bias_e + column * bias_n, mask=is_n, other=0.0).to(tl.float32)
    return tl.where(is_added, bias, 0.0)
