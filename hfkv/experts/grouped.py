"""All experts at once on an accelerator: kernels that read the weights as they are kept."""

from __future__ import annotations

from typing import Any

import torch

from hfkv.experts.projection import Projection
from hfkv.experts.weights import PlainWeights
from hfkv.kernels.experts.slots import ExpertSlots
from hfkv.kernels.triton.support import unsupported


def can_group(projections: tuple[Projection, ...], hidden_states: torch.Tensor) -> bool:
    """Whether the kernels can run: on a GPU, with Triton, where no gradients are asked for."""
    device = hidden_states.device
    if device.type == "cpu" or unsupported(device, projections[0].weights.dtype) is not None:
        return False
    tracked = [hidden_states, *(part for p in projections for f in p.factors for part in (f.a, f.b))]
    is_tracked = any(tensor.requires_grad for tensor in tracked) or any(p.is_trained for p in projections)
    return not (is_tracked and torch.is_grad_enabled())


def run_grouped(
    experts: Any,
    projections: tuple[Projection, Projection],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Runs all experts of a layer at once, without waiting for the device, so that a CUDA graph can hold it."""
    from hfkv.kernels.experts.triton_combine import combine

    up, down = projections
    slots = ExpertSlots(top_k_index, up.weights.shape[0])
    hidden = _linear(up, hidden_states.to(up.weights.dtype), slots, rows_are_slots=False)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    out = _linear(down, hidden, slots, rows_are_slots=True)
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out)
    # ExpertSlots of no expert here hold zeros, except what a gate or a norm makes of them; their weights are zero too.
    return combine(out, top_k_weights, hidden_states.dtype)


def _linear(projection: Projection, x: torch.Tensor, slots: ExpertSlots, *, rows_are_slots: bool) -> torch.Tensor:
    from hfkv.kernels.experts.triton import expert_linear

    weights = projection.weights
    y = expert_linear(x, weights.codes(), slots, weights.shape[1], projection.bias, rows_are_slots=rows_are_slots)
    for factors in projection.factors:
        inner = expert_linear(
            x, PlainWeights(factors.a.to(x.dtype)).codes(), slots, factors.a.shape[1], rows_are_slots=rows_are_slots
        )
        outer = expert_linear(
            inner, PlainWeights(factors.b.to(x.dtype)).codes(), slots, weights.shape[1], rows_are_slots=True
        )
        y = torch.add(y, outer, alpha=factors.scaling)
    return y
