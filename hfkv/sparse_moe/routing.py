"""Routing: which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Routing = Literal["hard", "soft"]
Gate = Literal["softmax", "sigmoid"]

# Routings that let one token's output depend on tokens after it.
NOT_CAUSAL = {
    "expert_choice": "each expert picks its tokens among all of a sequence, later ones included",
    "soft_moe": "each expert works on a weighted mean of all tokens of a sequence, later ones included",
}
# Keeps the quotient finite where every chosen sigmoid has underflown (DeepSeek-V3 adds as much).
TINY = 1e-20


@dataclass(frozen=True)
class Routed:
    """The choice of experts for T tokens.

    Attributes:
        logits: the router's output, [T, E] float32.
        probabilities: the scores of all experts as shares that sum to 1, [T, E] float32; carries gradients.
        index: the experts of every token, [T, K] int64. Soft routing has K = E.
        weights: what their outputs are multiplied with, [T, K] float32; carries gradients.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


class Router(nn.Module):
    """A linear map from hidden states to one logit an expert, computed in float32 whatever the dtype of the model.

    Its only parameter is ``weight`` [E, H], named as in transformers' Mixtral and Qwen3-MoE.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits [T, E], float32, of hidden states [T, H]."""
        # Autocast would round the product to its own dtype: near-ties would then be decided by rounding.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float())

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}"


def check_routing(routing: str, gate: str, num_experts: int, top_k: int, renormalise: bool) -> None:
    """Refuses what cannot be routed.

    Raises:
        NotImplementedError: the routing mixes tokens.
        TypeError: a number of experts is not an int.
        ValueError: a name, or a number of experts, is not allowed.
    """
    if routing in NOT_CAUSAL:
        raise NotImplementedError(
            f"routing={routing!r} is not causal: {NOT_CAUSAL[routing]}. In a decoder a token would see what it is to "
            'predict, and generating token by token would give other results than training did. Use "hard" or "soft"'
        )
    if routing not in ("hard", "soft"):
        raise ValueError(f'routing takes "hard" or "soft", got {routing!r}')
    if gate not in ("softmax", "sigmoid"):
        raise ValueError(f'gate takes "softmax" or "sigmoid", got {gate!r}')
    for name, value in (("num_experts", num_experts), ("top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} takes an int, got {value!r}")
    if num_experts < 2:
        raise ValueError(f"num_experts takes 2 or more, got {num_experts}; with one expert nothing is routed")
    if routing == "soft":
        return
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k takes 1 to num_experts, which is {num_experts}; got {top_k}")
    if top_k == 1 and renormalise:
        raise ValueError(
            "top_k=1 with renormalise=True gives every token the weight 1, whatever the router says: no gradient of "
            "the task reaches the router. Use renormalise=False, or top_k=2 or more"
        )


def route(
    logits: torch.Tensor,
    top_k: int,
    routing: Routing = "hard",
    gate: Gate = "softmax",
    renormalise: bool = True,
    choice_bias: torch.Tensor | None = None,
) -> Routed:
    """Routes T tokens.

    Args:
        logits: [T, E] float32.
        top_k: experts a token; soft routing takes all.
        routing: ``"hard"`` for the `top_k` highest scores, ``"soft"`` for all experts of every token.
        gate: what makes scores of logits: a softmax over all experts, or a sigmoid of each.
        renormalise: whether the weights of a token are divided by their sum. A soft softmax sums to 1 as it is.
        choice_bias: [E], added to the scores when experts are chosen and nowhere else (DeepSeek-V3); may be None.

    Returns:
        The choice. Gradients flow through weights and probabilities, none through the choice.
    """
    if gate == "softmax":
        scores = probabilities = logits.softmax(-1)
    else:
        scores = logits.sigmoid()
        probabilities = scores / (scores.sum(-1, keepdim=True) + TINY)
    if routing == "soft":
        index = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        return Routed(logits, probabilities, index, probabilities if renormalise else scores)
    choice = scores.detach() if choice_bias is None else scores.detach() + choice_bias
    index = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, index)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return Routed(logits, probabilities, index, weights)


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass, as the second forward of gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1
