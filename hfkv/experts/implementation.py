"""The experts ``"hfkv"`` of transformers' experts interface: reads compressed experts, and each chosen one once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hfkv.codecs.autocast import own_precision
from hfkv.experts.by_expert import run_by_expert
from hfkv.experts.families import weight_names
from hfkv.experts.grouped import can_group, run_grouped
from hfkv.experts.offload.offloaded import OffloadedWeights, run_offloaded
from hfkv.experts.projection import Projection, projection_of
from hfkv.experts.weights import PlainWeights

NAME = "hfkv"


def register() -> None:
    """Makes ``experts_implementation="hfkv"`` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Runs the experts of a layer, and weights and sums their outputs; the router is the model's own.

    On a CPU each expert runs with the tokens that chose it, in oneDNN's order where a patch packed it. On a GPU a
    gather-GEMV (few slots) or a grouped GEMM (many) reads the weights as they are kept, without a copy and without
    waiting for the device. There the experts themselves are trained by transformers' own ``grouped_mm``.

    Args:
        self: a module with transformers' attributes of experts (`has_gate`, `is_transposed`, ...).
        hidden_states: `[T, H]`.
        top_k_index: integers `[T, K]`; an index at or above the experts of this process is skipped.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, H]`, in the dtype of `hidden_states`.
    """
    up, down = (projection_of(self, name) for name in weight_names(self))
    is_trained = up.is_trained or down.is_trained
    is_plain = not (up.is_stack or down.is_stack)
    has_adapters = bool(up.factors or down.factors)
    if is_plain and not has_adapters and (torch.compiler.is_compiling() or (is_trained and _is_accelerator(up))):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    if is_plain and is_trained:
        up, down = (_unbound(projection) for projection in (up, down))
    elif can_group((up, down), hidden_states):
        run = run_offloaded if isinstance(up.weights, OffloadedWeights) else run_grouped
        with own_precision():
            return run(self, (up, down), hidden_states, top_k_index, top_k_weights)
    # A trainer's autocast is for the products of plain matrices too, as it is in transformers' own experts.
    with nullcontext() if is_plain and torch.is_grad_enabled() else own_precision():
        return run_by_expert(self, (up, down), hidden_states, top_k_index, top_k_weights)


def _is_accelerator(projection: Projection) -> bool:
    return projection.weights.device.type != "cpu"


def _unbound(projection: Projection) -> Projection:
    """The projection with a tensor for each matrix, so that its gradient is not as large as all of them."""
    assert isinstance(projection.weights, PlainWeights)
    return Projection(projection.weights.unbound(), projection.bias, projection.factors, True)


register()
