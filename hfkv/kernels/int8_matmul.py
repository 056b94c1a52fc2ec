"""The one place that calls torch's own int8 matrix product on a CPU, and fixed-point numbers for it."""

from __future__ import annotations

import torch

# int32 sums of K products of two int8 numbers are exact up to here.
MAX_INNER = (2**31 - 1) // (128 * 128)

# Rows become three digits of seven bits: errors of 2^-21 of a row's largest magnitude, as good as float32 sums. The
# digits of all rows go through one product together, which reads the other operand once.
NUM_DIGITS = 3
_BASE = 128
_TOP = 127 * _BASE * _BASE


def int8_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of int8 matrices with exact int32 sums, into `out`.

    Torch has a second int8 product, `_weight_int8pack_mm`, which crashes or gives wrong numbers where the inner
    dimension is no multiple of its tiles; this one takes any.

    Args:
        a: int8 `[M, K]`.
        b: int8 `[K, N]`; a transposed view is as fast.
        out: int32 `[M, N]`, contiguous.

    Raises:
        ValueError: other shapes, dtypes or devices, or a K above `MAX_INNER`.
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
    return torch._int_mm(a, b, out=out)


def to_digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as digits: ``x ≈ scale · (d0 · 2^14 + d1 · 2^7 + d2)``.

    Args:
        x: float32 `[..., R, K]`; not kept.

    Returns:
        int8 `[..., 3, R, K]`, and the scales, float32 `[..., R, 1]`; NaN for rows that hold NaN or infinity.
    """
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny * _TOP) / _TOP
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    whole = (x / scale).round_().to(torch.int32)
    digits = torch.empty(*x.shape[:-2], NUM_DIGITS, *x.shape[-2:], dtype=torch.int8)
    digits.select(-3, 0).copy_(whole >> 14)
    digits.select(-3, 1).copy_((whole >> 7) & 127)
    digits.select(-3, 2).copy_(whole & 127)
    return digits, scale


def from_digits(sums: torch.Tensor) -> torch.Tensor:
    """What products of digits `[..., 3, R, N]` (int32) say, float32 `[..., R, N]`; to be multiplied by the scales."""
    result = sums.select(-3, 0).to(torch.float32).mul_(_BASE)
    result.add_(sums.select(-3, 1)).mul_(_BASE)
    return result.add_(sums.select(-3, 2))
