"""The one place that calls torch's own int8 matrix product on a CPU, and fixed-point numbers for it."""

from __future__ import annotations

import functools

import torch

# int32 sums of K products of two int8 numbers are exact up to here.
MAX_INNER = (2**31 - 1) // (128 * 128)

# Digits of seven bits. Queries take three of them: errors of 2^-21 of a row's largest number, as good as float32 sums.
# Weights take four: beside the one weight of an attention sink, thousands of small ones count too. The digits of all
# rows go through one product together, which reads the other operand once.
QUERY_DIGITS, WEIGHT_DIGITS = 3, 4
_BITS, _BASE = 7, 128


def int8_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Computes ``a @ b`` of int8 matrices with exact int32 sums, into `out`.

    Torch has a second int8 product, `_weight_int8pack_mm`, which crashes or gives wrong numbers where the inner
    dimension is no multiple of its tiles; this one takes any. It is exact only where `is_exact`.

    Args:
        a: first factor, int8 `[M, K]`.
        b: second factor, int8 `[K, N]`; a transposed view is as fast.
        out: result, int32 `[M, N]`, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices are other ones, or K is above `MAX_INNER`.
    """
    (m, inner), (inner_b, n) = a.shape, b.shape
    dtypes = (a.dtype, b.dtype, out.dtype)
    if dtypes != (torch.int8, torch.int8, torch.int32) or not a.device.type == b.device.type == "cpu":
        raise ValueError(f"int8_matmul takes int8, int8 and int32 tensors on a CPU, got {dtypes} on {a.device}")
    if inner != inner_b or out.shape != (m, n) or not out.is_contiguous() or inner > MAX_INNER:
        raise ValueError(
            f"int8_matmul takes [M, K], [K, N] and a contiguous [M, N] with K <= {MAX_INNER}, got {list(a.shape)}, "
            f"{list(b.shape)} and {list(out.shape)}"
        )
    if 0 in (m, n, inner):
        return out.zero_()
    if inner == 1:  # with strides of 1 and 1, torch's product takes b for its transpose
        return torch.mul(a.int(), b.int(), out=out)
    return torch._int_mm(a, b, out=out)


@functools.cache
def is_exact() -> bool:
    """Whether torch's product is exact on this processor: without VNNI instructions its sums of pairs saturate."""
    a = torch.full((16, 64), 127, dtype=torch.int8)
    a[::2] = -128
    b = torch.full((64, 64), 127, dtype=torch.int8)
    b[:, ::2] = -128
    expected = (a.double() @ b.double()).int()
    out = torch.empty(16, 64, dtype=torch.int32)
    return all(torch.equal(int8_matmul(a, other, out), expected) for other in (b, b.t().contiguous().t()))


def to_digits(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits rows into digits: ``x ≈ scale · (d0 · 128^(count - 1) + d1 · 128^(count - 2) + ...)``.

    Args:
        x: rows, float32 `[..., R, K]`.
        count: number of digits, four at most.

    Returns:
        The digits, int8 `[..., count, R, K]`, and the scales, float32 `[..., R, 1]`: NaN for rows with NaN or infinity.
    """
    top = 127 * _BASE ** (count - 1)
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny * top) / top
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    whole = (x / scale).round_().to(torch.int32)
    digits = torch.empty(*x.shape[:-2], count, *x.shape[-2:], dtype=torch.int8)
    for place in range(count - 1, 0, -1):
        digits.select(-3, place).copy_(whole & (_BASE - 1))
        whole.bitwise_right_shift_(_BITS)
    digits.select(-3, 0).copy_(whole)
    return digits, scale


def from_digits(sums: torch.Tensor) -> torch.Tensor:
    """Joins products of digits, int32 `[..., count, R, N]`, to float32 `[..., R, N]`, without the scales."""
    result = sums.select(-3, 0).to(torch.float32)
    for place in range(1, sums.shape[-3]):
        result.mul_(_BASE).add_(sums.select(-3, place))
    return result
