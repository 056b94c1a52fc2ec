"""Attention by a kernel to what a layer holds, where the model's own masks say what is visible."""

from __future__ import annotations

import torch

from hfkv.held import HeldTokens
from hfkv.kernels.dispatch import Kernel, choose
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.mask import CausalMask


def kernel_for(query: torch.Tensor, held: HeldTokens, scoring: Scoring) -> Kernel | None:
    """The kernel that attends to `held`, or None where none does all that is asked for.

    Args:
        query: `[B, Hq, q, D]`.
        held: the tokens.
        scoring: what becomes of scores.
    """
    is_followed = torch.is_grad_enabled() and query.requires_grad  # a backward pass must find its way, and then raise
    if scoring.weights or scoring.dropout or is_followed or query.dtype != held.parts["key"].dtype:
        return None
    kernel = choose(held.codec.name, query.dtype, query.device, query.shape[2])
    return None if kernel.attend is None else kernel


def fused_attention(
    query: torch.Tensor, held: HeldTokens, mask: torch.Tensor | None, is_causal: bool, scoring: Scoring
) -> torch.Tensor | None:
    """Attention `[B, Hq, q, Dv]` to tokens under no window of ours, or None where no kernel does all that is asked for.

    Args:
        query: `[B, Hq, q, D]`.
        held: the tokens, the queries' own included.
        mask: what the model says is visible, `[B, 1 or Hq, q, T]`; None for causal or full attention.
        is_causal: which of the two.
        scoring: what becomes of scores.
    """
    kernel = kernel_for(query, held, scoring)
    if kernel is None:
        return None
    visibility = _visibility(query, held, mask, is_causal)
    if visibility is None:
        return None
    assert kernel.attend is not None
    return kernel.attend(query, *held.encoded(), visibility, scoring).out


def _visibility(query: torch.Tensor, held: HeldTokens, mask: torch.Tensor | None, is_causal: bool) -> Visibility | None:
    """What `mask` says, or None where it says more than what is visible."""
    batch, num_queries, num_shown = query.shape[0], query.shape[2], held.last - held.first
    # Positions are counted from the first token held: only their order matters.
    visibility = Visibility(seen=held.last, pads=(0,) * batch, first=held.first)
    if mask is None:
        return visibility if num_queries == 1 or (is_causal and num_queries == num_shown) else None
    if mask.shape[-1] != num_shown or mask.dtype != torch.bool or mask.dim() != 4:
        return None
    pads = mask.left_padding() if isinstance(mask, CausalMask) and held.first == 0 else None
    if pads is not None:
        return Visibility(seen=held.last, pads=pads if len(pads) == batch else pads * batch)
    plain = mask.plain() if isinstance(mask, CausalMask) else mask
    return Visibility(seen=held.last, pads=(0,) * batch, first=held.first, mask=plain)
