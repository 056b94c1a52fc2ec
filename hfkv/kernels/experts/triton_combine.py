"""`combine`: each token's slots, weighted by the router and added up."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hfkv.kernels.operators import Operator
from hfkv.kernels.triton.numbers import cast

# Numbers of a token that a program adds up. Not measured on a GPU yet.
BLOCK_H = 512


@triton.jit
def _combine_kernel(
    y_ptr,
    y_row,
    y_h,
    weights_ptr,
    weights_t,
    weights_k,
    out_ptr,
    num_outputs,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_h = h < num_outputs
    acc = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + t * weights_t + k * weights_k).to(tl.float32)
        y = tl.load(y_ptr + (t * TOP_K + k) * y_row + h * y_h, mask=is_h, other=0.0)
        acc += weight * y.to(tl.float32)
    tl.store(out_ptr + t * num_outputs + h, cast(acc, out_ptr.dtype.element_ty), mask=is_h)


def _combine(y: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    num_tokens, top_k = weights.shape
    out = y.new_empty(num_tokens, y.shape[1], dtype=dtype)
    if out.numel() == 0:
        return out
    block_h = min(BLOCK_H, triton.next_power_of_2(y.shape[1]))
    _combine_kernel[(num_tokens, triton.cdiv(y.shape[1], block_h))](
        *(y, *y.stride(), weights, *weights.stride(), out, y.shape[1], top_k, block_h),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _fake(y, weights, dtype):
    return y.new_empty(weights.shape[0], y.shape[1], dtype=dtype)


_operator = Operator("combine_slots", _combine, _fake)


def combine(y: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each token's slots, weighted and added up in float32: `combine_naive`.

    Reads 2 * K * H bytes a token in bf16 and writes 2 * H; products that are written and then summed up move three
    times as many, in two launches. There is no gradient.

    Args:
        y: `[S, H]` in slot order, S = T * K; bf16, fp16 or fp32, of any strides.
        weights: `[T, K]`, of any float dtype and strides.
        dtype: dtype of the result.

    Returns:
        `[T, H]` of `dtype`, rounded once.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if y.ndim != 2 or weights.ndim != 2 or y.shape[0] != weights.numel():
        raise ValueError(f"{list(y.shape)} slots for weights {list(weights.shape)}")
    return _operator(y, weights, dtype)
