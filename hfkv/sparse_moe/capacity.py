"""The capacity of experts: how many tokens each takes, and which find room."""

from __future__ import annotations

import math

import torch


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """How many (token, slot) pairs each expert takes: the mean load times the factor, rounded up."""
    return math.ceil(capacity_factor * num_tokens * top_k / num_experts)


def kept_slots(
    index: torch.Tensor, num_experts: int, capacity: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Marks the (token, slot) pairs that find room.

    Tokens come first that are first in the batch, so that no token loses its place to a later one. Tokens that are
    masked out take no room, and keep their experts.

    Args:
        index: experts [T, K], int64.
        num_experts: E.
        capacity: pairs an expert takes.
        token_mask: [T] bool, False for padding; may be None.

    Returns:
        [T, K] bool.
    """
    flat = index.flatten()
    if token_mask is not None:
        # Padding goes to an expert of its own, behind the others.
        flat = flat.masked_fill(~token_mask.repeat_interleave(index.shape[1]), num_experts)
    ordered, order = flat.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=flat.device))
    ranks = torch.arange(flat.numel(), device=flat.device) - starts[ordered]
    kept = torch.empty_like(flat, dtype=torch.bool)
    kept[order] = (ranks < capacity) | (ordered == num_experts)
    return kept.view_as(index)
