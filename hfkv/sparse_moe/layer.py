"""`SparseMoE`: a feed-forward layer of many experts, a few of which see each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from hfkv.sparse_moe.capacity import expert_capacity, kept_slots
from hfkv.sparse_moe.last_forward import LastForward
from hfkv.sparse_moe.layer_experts import LayerExpertsConfig, default_implementation, experts_class
from hfkv.sparse_moe.routing import Gate, Routed, Router, Routing, check_routing, is_recomputing, route

BALANCE_COEF = 0.01  # Switch Transformers
Z_COEF = 0.001  # ST-MoE
BIAS_UPDATE_RATE = 0.001  # DeepSeek-V3
ROUTER_STD = 0.02


class SparseMoE(nn.Module):
    """A router, and E experts of which each token sees K: the weighted sum of their outputs.

    Router logits, scores and weights are computed in float32. Without a capacity no token is dropped, and a row's
    output does not depend on the batch. The parameters are named as in transformers' Mixtral: ``gate.weight`` [E, H],
    and in ``experts`` the stacks ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] (``up_proj`` [E, I, H] without
    a gate).

    The experts are a module behind transformers' experts interface: ``layer.experts_implementation`` says which code
    runs them, ``"grouped_mm"`` at first where torch's grouped product takes the weights (float32, bfloat16, float16;
    rows of whole 16 bytes), else ``"eager"``. Deep copies and pickles have one of their own.

    The losses of the last forward are read with `hfkv.moe_losses`. With ``balance="bias"`` the layer keeps two float32
    buffers, ``balance_bias`` [E] and ``balance_load`` [E], both in its state dict. A forward in training mode first
    moves the bias of every expert by `bias_update_rate`, up where the load of the training forward before was below
    the mean, down where it was above, and then notes its own load. The second forward of gradient checkpointing does
    neither, and finds the bias of the first, as long as each forward is followed by its backward.
    DistributedDataParallel broadcasts buffers before each forward: all processes move their bias by the load of the
    first.

    Args:
        hidden_size: H.
        intermediate_size: I, each expert's own.
        num_experts: E, at least 2.
        top_k: K, experts a token; ignored by soft routing.
        routing: ``"hard"``, the K highest scores, or ``"soft"``, all experts weighted by their probabilities, at E / K
            times the work.
        gate: ``"softmax"`` over all experts, or ``"sigmoid"`` of each logit.
        renormalise: whether a token's weights are divided by their sum.
        gated: whether an expert is ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``.
        activation: a name of transformers' activations, or a module.
        bias: whether the experts' matrices have biases.
        balance: ``"loss"``: `load_balancing_loss`; ``"bias"``: a bias on the choice (DeepSeek-V3); or None.
        balance_coef: factor on the balance loss in `hfkv.moe_losses`; None for 0.01. Only with ``balance="loss"``.
        z_coef: factor on the router z-loss there.
        bias_update_rate: how far a bias moves in a forward; None for 0.001. Only with ``balance="bias"``.
        capacity_factor: an expert takes at most ``ceil(factor * T * K / E)`` (token, slot) pairs of a forward, tokens
            first in the batch first; the others lose that slot, and its weight with it. Then a row's output depends on
            what else is in the batch and on its length, in evaluation too; the attribute can be set. None: dropless.
        device, dtype: the parameters' device and dtype.

    Raises:
        NotImplementedError: the routing is not causal.
        TypeError, ValueError: an argument is not allowed, or two exclude each other.
    """

    balance_bias: torch.Tensor
    balance_load: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        routing: Routing = "hard",
        gate: Gate = "softmax",
        renormalise: bool = True,
        gated: bool = True,
        activation: str | nn.Module = "silu",
        bias: bool = False,
        balance: Literal["loss", "bias"] | None = "loss",
        balance_coef: float | None = None,
        z_coef: float = Z_COEF,
        bias_update_rate: float | None = None,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_routing(routing, gate, num_experts, top_k, renormalise)
        _check_balance(routing, balance, balance_coef, z_coef, bias_update_rate, capacity_factor)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = num_experts if routing == "soft" else top_k
        self.routing = routing
        self.gate_kind = gate
        self.renormalise = renormalise
        self.balance = balance
        self.balance_coef = (BALANCE_COEF if balance_coef is None else balance_coef) if balance == "loss" else 0.0
        self.z_coef = z_coef
        self.bias_update_rate = BIAS_UPDATE_RATE if bias_update_rate is None else bias_update_rate
        self.capacity_factor = capacity_factor
        self.last_forward: LastForward | None = None
        self.gate = Router(hidden_size, num_experts, device, dtype)
        self._default = default_implementation(hidden_size, intermediate_size, self.gate.weight.dtype)
        # The experts' own, held here too: adapters wrap the experts.
        self.experts_config = LayerExpertsConfig(self._default, self.top_k)
        self.experts = experts_class(gated, bias)(
            self.experts_config, num_experts, hidden_size, intermediate_size, activation, device, dtype
        )
        if balance == "bias":
            for name in ("balance_bias", "balance_load"):
                self.register_buffer(name, torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew: the router normal, the experts as `torch.nn.Linear` draws its own."""
        nn.init.normal_(self.gate.weight, std=ROUTER_STD)
        for name, stack in self.experts.named_parameters():
            fan_in = self.intermediate_size if name.startswith("down") else self.hidden_size
            nn.init.uniform_(stack, -(fan_in**-0.5), fan_in**-0.5)
        if self.balance == "bias":
            self.balance_bias.zero_()
            self.balance_load.zero_()

    @property
    def experts_implementation(self) -> str:
        """The name under which transformers' experts interface knows the code that runs the experts."""
        return self.experts_config._experts_implementation

    @experts_implementation.setter
    def experts_implementation(self, name: str) -> None:
        self.experts_config._experts_implementation = name

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Routes every token and adds up what its experts make of it.

        Args:
            hidden_states: [B, T, H] or [T, H]; T = 0 works.
            token_mask: [B, T] or [T], False or 0 for padding, which is then left out of losses, loads, statistics and
                capacity; its output is computed all the same. May be None.

        Returns:
            The shape and dtype of the hidden states.

        Raises:
            ValueError: the shapes are others.
        """
        if hidden_states.ndim not in (2, 3) or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"SparseMoE takes [B, T, {self.hidden_size}] or [T, {self.hidden_size}], "
                f"got {tuple(hidden_states.shape)}"
            )
        if token_mask is not None:
            if token_mask.shape != hidden_states.shape[:-1]:
                raise ValueError(f"token_mask must be {tuple(hidden_states.shape[:-1])}, got {tuple(token_mask.shape)}")
            token_mask = token_mask.reshape(-1).to(hidden_states.device, torch.bool)
        tokens = hidden_states.reshape(-1, self.hidden_size)
        is_first = not is_recomputing()
        moves_bias = self.balance == "bias" and self.training and is_first
        if moves_bias:
            self._move_bias()
        bias = self.balance_bias if self.balance == "bias" else None
        routed = route(self.gate(tokens), self.top_k, self.routing, self.gate_kind, self.renormalise, bias)
        weights, kept = routed.weights, None
        if self.capacity_factor is not None and tokens.shape[0]:
            num_tokens = tokens.shape[0] if token_mask is None else int(token_mask.sum())
            capacity = expert_capacity(num_tokens, self.num_experts, self.top_k, self.capacity_factor)
            kept = kept_slots(routed.index, self.num_experts, capacity, token_mask)
            weights = weights * kept
        if moves_bias:
            self._note_load(routed.index, token_mask)
        if is_first:
            self._remember(routed, token_mask, kept)
        return self.experts(tokens, routed.index, weights).view_as(hidden_states)

    def _remember(self, routed: Routed, token_mask: torch.Tensor | None, kept: torch.Tensor | None) -> None:
        has_gradients = routed.logits.requires_grad
        lacks_gradients = self.training and not has_gradients and self.gate.weight.requires_grad
        is_soft = self.routing == "soft"
        last = LastForward(routed, None, token_mask, kept, lacks_gradients, is_soft, self.num_experts, self.top_k)
        self.last_forward = last if self.training or has_gradients else last.slimmed()

    @torch.no_grad()
    def _move_bias(self) -> None:
        load = self.balance_load
        self.balance_bias.add_(torch.sign(load.mean() - load), alpha=self.bias_update_rate)

    @torch.no_grad()
    def _note_load(self, index: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        counted = torch.ones_like(index, dtype=torch.float32)
        if token_mask is not None:
            counted *= token_mask[:, None]
        self.balance_load.zero_().scatter_add_(0, index.flatten(), counted.flatten())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseMoE:
        buffers = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            after = getattr(self, name)
            # Steps of 0.001 are lost in half precision: buffers move between devices and keep their dtype.
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        default = default_implementation(self.hidden_size, self.intermediate_size, self.gate.weight.dtype)
        if self.experts_implementation == self._default:
            self.experts_implementation = default
        self._default = default
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file has no graph: tensors inside one can be neither copied nor pickled.
        return {**vars(self), "last_forward": None}

    def extra_repr(self) -> str:
        dropping = "dropless" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"
        return (
            f"top_k={self.top_k}, routing={self.routing!r}, gate={self.gate_kind!r}, renormalise={self.renormalise}, "
            f"balance={self.balance!r}, {dropping}, experts_implementation={self.experts_implementation!r}"
        )


def _check_balance(
    routing: str,
    balance: str | None,
    balance_coef: float | None,
    z_coef: float,
    bias_update_rate: float | None,
    capacity_factor: float | None,
) -> None:
    if balance not in ("loss", "bias", None):
        raise ValueError(f'balance takes "loss", "bias" or None, got {balance!r}')
    if balance_coef is not None and balance != "loss":
        raise ValueError(f'balance_coef goes with balance="loss", got balance={balance!r}; leave balance_coef out')
    if bias_update_rate is not None and balance != "bias":
        raise ValueError(
            f'bias_update_rate goes with balance="bias", got balance={balance!r}; leave bias_update_rate out'
        )
    for name, value in (("balance_coef", balance_coef), ("z_coef", z_coef), ("bias_update_rate", bias_update_rate)):
        if value is not None and value < 0:
            raise ValueError(f"{name} takes 0 or more, got {value}")
    if routing == "soft" and balance == "bias":
        raise ValueError('balance="bias" moves the choice of experts, and soft routing takes all; use "loss" or None')
    if capacity_factor is not None and routing == "soft":
        raise ValueError("capacity_factor limits the tokens of experts, and soft routing takes all; leave it out")
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"capacity_factor takes a number above 0 or None, got {capacity_factor}")
