"""The naive twins of the experts' kernels: what each must compute, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hfkv.kernels.experts.codes import GROUP, Codes, check_linear
from hfkv.kernels.experts.slots import ExpertSlots


def decode_naive(codes: Codes, expert: int) -> torch.Tensor:
    """One expert's rows, float32 `[N, K]`."""
    weight = codes.weight[expert]
    if codes.scale is not None:
        return weight.float() * codes.scale[expert, :, None]
    if codes.groups is None or codes.rows is None:
        return weight.float()
    packed = weight.unflatten(1, (-1, GROUP // 2))  # [N, Kp / 32, 16]
    nibbles = torch.cat((packed & 0xF, packed >> 4), dim=2)
    step, centre = (codes.groups[expert] * codes.rows[expert].float()).transpose(0, 1)[..., None].unbind(2)
    return ((nibbles.float() - 8) * step + centre).flatten(1)[:, : codes.num_inputs]


def expert_linear_naive(
    x: torch.Tensor,
    parts: tuple[Codes, ...],
    slots: ExpertSlots,
    num_outputs: int,
    bias: torch.Tensor | None = None,
    *,
    rows_are_slots: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Each slot's row through its expert's matrix, one expert after the other.

    Args:
        x: `[T, K]`, or with `rows_are_slots` `[S, K]`.
        parts: the experts' matrices, `num_outputs` rows in all.
        slots: which expert each slot goes to.
        num_outputs: outputs of the layer.
        bias: `[E, num_outputs]` or None.
        rows_are_slots: whether each slot has a row of its own, or reads its token's.
        dtype: the dtype to compute in; None for the dtype of `x`.

    Returns:
        `[S, num_outputs]` in slot order, of `dtype`; zeros in slots of no expert.

    Raises:
        ValueError: arguments that do not belong together.
    """
    num_rows = slots.num_slots if rows_are_slots else slots.num_tokens
    check_linear(x, parts, num_rows, slots.num_experts, num_outputs, bias)
    x = x.to(x.dtype if dtype is None else dtype)
    x = x if rows_are_slots else x.repeat_interleave(slots.top_k, dim=0)
    out = x.new_zeros(slots.num_slots, num_outputs)
    offsets = slots.offsets.tolist()
    for expert in range(slots.num_experts):
        mine = slots.order[offsets[expert] : offsets[expert + 1]]
        if len(mine) == 0:
            continue
        for part in parts:
            y = F.linear(x[mine], decode_naive(part, expert).to(x.dtype))
            columns = torch.arange(num_outputs, device=x.device) if part.columns is None else part.columns[expert]
            out[mine[:, None], columns.long()] = y if bias is None else y + bias[expert, columns.long()].to(x.dtype)
    return out


def combine_naive(y: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each token's slots, weighted and added up in float32: `[S, H]` and `[T, K]` to `[T, H]` of `dtype`."""
    weighted = y.float() * weights.float().reshape(-1, 1)
    return weighted.unflatten(0, weights.shape).sum(dim=1).to(dtype)
