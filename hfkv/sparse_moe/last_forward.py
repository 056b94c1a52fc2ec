"""What a `SparseMoE` remembers of its last forward, for its losses and for statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hfkv.sparse_moe.losses import load_balancing_loss, router_z_loss
from hfkv.sparse_moe.routing import Routed

# Beyond so many logits (1 MiB) a forward that trains nothing keeps its losses and lets the logits go.
KEPT_LOGITS = 2**18


@dataclass(frozen=True)
class LastForward:
    """What a `SparseMoE` remembers of its last forward, until the next.

    Attributes:
        routed: logits, probabilities and choice; None where they were not kept.
        scalars: balance and z-loss, where `routed` was not kept; else None.
        token_mask: [T] bool as given to the forward, or None.
        kept: (token, slot) pairs within the capacity, [T, K] bool; None without a capacity.
        lacks_gradients: whether the layer was training, and gradients were off.
        is_soft, num_experts, top_k: the layer's own.
    """

    routed: Routed | None
    scalars: tuple[torch.Tensor, torch.Tensor] | None
    token_mask: torch.Tensor | None
    kept: torch.Tensor | None
    lacks_gradients: bool
    is_soft: bool
    num_experts: int
    top_k: int

    def losses(self, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes balance and z-loss, scalars.

        Raises:
            ValueError: the mask has another size than the forward.
            RuntimeError: a mask was given, and the logits were not kept.
        """
        mask = self.token_mask
        if self.routed is None:
            assert self.scalars is not None
            if attention_mask is not None:
                raise RuntimeError(
                    f"a forward without training or gradients keeps logits up to {KEPT_LOGITS:,} numbers, and this one "
                    "had more: no mask can be applied now. Take smaller batches, or leave attention_mask out"
                )
            return self.scalars
        routed = self.routed
        if attention_mask is not None:
            num_tokens = routed.logits.shape[0]
            if attention_mask.numel() != num_tokens:
                raise ValueError(
                    f"attention_mask must have an entry for each of the {num_tokens} tokens of the last forward, got "
                    f"{tuple(attention_mask.shape)}; where a cache held earlier tokens, give the last columns"
                )
            given = attention_mask.reshape(-1).to(routed.logits.device, torch.bool)
            mask = given if mask is None else mask & given
        chosen = None if self.is_soft else routed.index
        balance = load_balancing_loss(routed.probabilities, chosen, self.num_experts, self.top_k, mask)
        return balance, router_z_loss(routed.logits, mask)

    def slimmed(self) -> LastForward:
        """This record for a forward that trains nothing: many logits are replaced by their losses."""
        if self.routed is None or self.routed.logits.numel() <= KEPT_LOGITS:
            return self
        return replace(self, routed=None, scalars=self.losses())
