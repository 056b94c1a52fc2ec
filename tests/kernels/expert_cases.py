"""Experts of every codec filled at random, choices of experts, and how well their linear layers are computed."""

from __future__ import annotations

from typing import Any

import torch

from hfkv.kernels.experts.codes import GROUP, Codes
from hfkv.kernels.experts.naive import expert_linear_naive
from hfkv.kernels.experts.slots import ExpertSlots

CODECS = ("none", "int8", "int4")
FORMS = (*CODECS, "transposed", "mixed")


def part(codec: str, shape: tuple[int, int, int], dtype: torch.dtype, columns: torch.Tensor | None = None) -> Codes:
    """`[E, N, K]` random numbers of about 0.1, or codes; what lies behind a row or a group is not zero."""
    experts, rows, inputs = shape
    if codec == "none":
        return Codes(torch.randn(shape).mul(0.1).to(dtype), None, None, None, columns, inputs)
    if codec == "transposed":
        stack = torch.randn(experts, inputs, rows).mul(0.1).to(dtype)
        return Codes(stack.transpose(1, 2), None, None, None, columns, inputs)
    if codec == "int8":
        scale = torch.rand(experts, rows) * 2e-3
        codes = torch.randint(-127, 128, shape, dtype=torch.int8)
        return Codes(codes, scale, None, None, columns, inputs)
    num_groups = -(-inputs // GROUP)
    codes = torch.randint(0, 256, (experts, rows, num_groups * GROUP // 2), dtype=torch.uint8)
    groups = torch.randint(-127, 128, (experts, num_groups, rows, 2), dtype=torch.int8)
    units = torch.rand(experts, rows, 2) * torch.tensor([4e-4, 1e-3])
    # The smaller of the two dtypes where columns have it.
    is_small = columns is not None and columns.dtype == torch.int16
    return Codes(codes, None, groups, units.bfloat16() if is_small else units, columns, inputs)


def stack(form: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Codes, ...]:
    """The parts of E matrices: one, or in the form "mixed" most rows in int4 and the others in int8, in any order."""
    experts, rows, inputs = shape
    if form != "mixed":
        return (to(part(form, shape, dtype), device),)
    columns = torch.stack([torch.randperm(rows) for _ in range(experts)]).int()
    few = max(1, rows // 16)
    return tuple(
        to(part(codec, (experts, mine.shape[1], inputs), dtype, mine.contiguous()), device)
        for codec, mine in (("int4", columns[:, few:].short()), ("int8", columns[:, :few]))
    )


def to(codes: Codes, device: torch.device) -> Codes:
    tensors = codes.weight, codes.scale, codes.groups, codes.rows, codes.columns
    # A copy to another device keeps the strides of a transposed stack.
    return Codes(*(None if tensor is None else tensor.to(device) for tensor in tensors), codes.num_inputs)  # type: ignore[arg-type]


def choose(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> ExpertSlots:
    """Different experts for each token, at random."""
    scores = torch.rand(num_tokens, num_experts)
    return ExpertSlots(scores.topk(top_k, dim=1).indices.to(device), num_experts)


def assert_close(out: torch.Tensor, x: torch.Tensor, *args: Any, **options: Any) -> None:
    """Asserts that `expert_linear` gave no more than twice the error of torch in the same dtype."""
    assert out.dtype == x.dtype
    exact = expert_linear_naive(x, *args, **options, dtype=torch.float64)
    same = expert_linear_naive(x, *args, **options)
    assert out.shape == exact.shape
    if out.numel() > 0:
        error = (out.double() - exact).abs().max()
        assert error <= 2 * (same.double() - exact).abs().max() + 1e-5  # False for NaN
