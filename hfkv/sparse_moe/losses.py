"""Losses that keep routers healthy: balance of the load, size of the logits."""

from __future__ import annotations

import torch


def load_balancing_loss(
    probabilities: torch.Tensor,
    chosen: torch.Tensor | None,
    num_experts: int,
    top_k: int,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly the tokens of one layer are spread over its experts: E · Σ_e f_e · P_e.

    P_e is the mean probability of expert e over the tokens, and f_e the mean number of times a token chose it, so that
    Σ P_e = 1 and Σ f_e = K. Perfect balance gives K; a router sure of the same K experts for all tokens gives E. This
    is the form of Switch Transformers (there K = 1) and, for one layer, of transformers' ``load_balancing_loss_func``.
    The latter takes the means over all layers together first, so that two layers with different dead experts can look
    balanced; this one is a layer's own.

    Soft routing chooses nothing: there f_e = P_e, which gives 1 at perfect balance, and otherwise 1 plus the squared
    coefficient of variation of the experts' importance (Shazeer et al. 2017).

    Args:
        probabilities: the router's, [T, E], each row summing to 1.
        chosen: experts of every token, [T, K] int64; None for soft routing.
        num_experts: E.
        top_k: K; not used for soft routing.
        token_mask: [T] bool, False for tokens to leave out; may be None.

    Returns:
        A scalar; 0 where there are no tokens. Gradients flow through P alone, since a choice has none.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != num_experts:
        raise ValueError(f"probabilities must be [T, E] with E = {num_experts}, got {tuple(probabilities.shape)}")
    if chosen is not None and chosen.shape != (probabilities.shape[0], top_k):
        raise ValueError(f"chosen must be [{probabilities.shape[0]}, {top_k}], as [T, K]; got {tuple(chosen.shape)}")
    kept = _kept(probabilities, token_mask)
    num_tokens = kept.sum().clamp(min=1)
    mean_probability = (probabilities.float() * kept[:, None]).sum(0) / num_tokens
    if chosen is None:
        return num_experts * (mean_probability * mean_probability).sum()
    counts = torch.zeros(num_experts, device=chosen.device)
    counts = counts.scatter_add(0, chosen.flatten(), kept.repeat_interleave(top_k))
    return num_experts * (counts / num_tokens * mean_probability).sum()


def router_z_loss(logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens of logsumexp(logits)², which keeps logits small (ST-MoE).

    Args:
        logits: [T, E].
        token_mask: [T] bool, False for tokens to leave out; may be None.

    Returns:
        A scalar; 0 where there are no tokens.
    """
    kept = _kept(logits, token_mask)
    return (logits.float().logsumexp(-1).square() * kept).sum() / kept.sum().clamp(min=1)


def _kept(rows: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """1.0 for every token that counts, [T] float32."""
    if token_mask is None:
        return torch.ones(rows.shape[0], device=rows.device)
    if token_mask.shape != rows.shape[:1]:
        raise ValueError(f"token_mask must be [{rows.shape[0]}], got {tuple(token_mask.shape)}")
    return token_mask.to(rows.device, torch.float32)
