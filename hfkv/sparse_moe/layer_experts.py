"""The experts of a `SparseMoE`: weights stacked over experts, behind transformers' experts interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

# torch's grouped product reads rows of whole 16 bytes, of these dtypes.
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_ROW_BYTES = 16


class LayerExpertsConfig:
    """The part of a model config that transformers' experts interface reads, one for every layer.

    Args:
        experts_implementation: ``"eager"``, ``"grouped_mm"``, ``"batched_mm"``, ``"hfkv"``, or any other name that
            transformers knows. It is kept under the name that transformers reads.
        num_experts_per_tok: K.
    """

    def __init__(self, experts_implementation: str, num_experts_per_tok: int) -> None:
        self._experts_implementation = experts_implementation
        self.num_experts_per_tok = num_experts_per_tok

    def __repr__(self) -> str:
        return f"LayerExpertsConfig({self._experts_implementation!r})"


def default_implementation(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> str:
    """``"grouped_mm"`` where torch's grouped product takes such weights, else ``"eager"``."""
    rows_fit = all(size * dtype.itemsize % GROUPED_ROW_BYTES == 0 for size in (hidden_size, intermediate_size))
    return "grouped_mm" if dtype in GROUPED_DTYPES and rows_fit else "eager"


class _Stacks(nn.Module):
    """E feed-forward networks, their weights stacked.

    With a gate: ``gate_up_proj`` [E, 2I, H], the gate's rows first; without: ``up_proj`` [E, I, H]. Then ``down_proj``
    [E, H, I], and with biases ``gate_up_proj_bias`` [E, 2I] or ``up_proj_bias`` [E, I], and ``down_proj_bias`` [E, H].
    """

    has_gate: bool
    has_bias: bool

    def __init__(
        self,
        config: LayerExpertsConfig,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | nn.Module,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        has_gate, has_bias = _FORMS[type(self)]
        self.num_experts = num_experts
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size
        self.act_fn = activation_module(activation)
        self.up_name = "gate_up_proj" if has_gate else "up_proj"
        up_size = (2 if has_gate else 1) * intermediate_size
        shapes = {self.up_name: (up_size, hidden_size), "down_proj": (hidden_size, intermediate_size)}
        for name, (rows, columns) in shapes.items():
            weight = torch.empty(num_experts, rows, columns, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
            if has_bias:
                bias = torch.empty(num_experts, rows, device=device, dtype=dtype)
                self.register_parameter(f"{name}_bias", nn.Parameter(bias))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Runs every expert on its tokens, one after the other (``"eager"``).

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K] int64.
            top_k_weights: [T, K], float32 or the dtype of the hidden states.

        Returns:
            [T, H], in the dtype of the hidden states.
        """
        num_slots = top_k_index.shape[1]
        experts, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        rows = hidden_states[order // num_slots].split(counts)
        # unbind, not an index an expert: its backward makes one gradient of the whole stack instead of E.
        names = (self.up_name, f"{self.up_name}_bias", "down_proj", "down_proj_bias")
        stacks = [getattr(self, name, None) for name in names]
        parts: list[Any] = [[None] * self.num_experts if stack is None else stack.unbind(0) for stack in stacks]
        outputs = [
            self._expert(own, *(part[expert] for part in parts)) for expert, own in enumerate(rows) if own.shape[0]
        ]
        if not outputs:
            return torch.zeros_like(hidden_states)
        # Back to one row a (token, slot), weighted there; only then are the slots of a token added up.
        slots = torch.cat(outputs)[order.argsort()].view(-1, num_slots, self.hidden_dim)
        return (slots * top_k_weights[:, :, None]).sum(1).to(hidden_states.dtype)

    def _expert(
        self,
        rows: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        inner = F.linear(rows, up, up_bias)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        return F.linear(inner, down, down_bias)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_dim}, "
            f"intermediate_size={self.intermediate_dim}, gated={self.has_gate}, bias={self.has_bias}"
        )


@use_experts_implementation
class GatedExperts(_Stacks):
    """Experts with a gate (SwiGLU and its kin), without biases."""


@use_experts_implementation(has_bias=True)
class GatedExpertsWithBias(_Stacks):
    """Experts with a gate and biases."""


@use_experts_implementation(has_gate=False)
class PlainExperts(_Stacks):
    """Experts of two matrices and an activation, without biases."""


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainExpertsWithBias(_Stacks):
    """Experts of two matrices, an activation and biases."""


# class -> has_gate, has_bias: transformers sets the attributes only after the constructor.
_FORMS: dict[type, tuple[bool, bool]] = {
    GatedExperts: (True, False),
    GatedExpertsWithBias: (True, True),
    PlainExperts: (False, False),
    PlainExpertsWithBias: (False, True),
}


def experts_class(gated: bool, bias: bool) -> Callable[..., _Stacks]:
    """The class of experts with or without a gate and biases."""
    return next(kind for kind, form in _FORMS.items() if form == (gated, bias))


def activation_module(activation: str | nn.Module) -> nn.Module:
    """The activation of a name, as a module.

    Raises:
        ValueError: transformers has none of that name.
    """
    if isinstance(activation, nn.Module):
        return activation
    if activation not in ACT2FN:
        raise ValueError(f"activation takes a module or one of {', '.join(sorted(ACT2FN))}; got {activation!r}")
    return ACT2FN[activation]
