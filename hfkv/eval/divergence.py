"""KL divergence: how far one run's forecasts are from another's, in nats a token."""

from __future__ import annotations

import torch


def kl_divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compute KL(full || other) of the next-token distributions of two runs over one text.

    It is 0 where both forecast the same, and infinite where `other` rules out what `full` does not.

    Args:
        full: Logits of the run to compare with, [..., V], any float dtype.
        other: Logits of the other run, [..., V], for the same tokens.

    Returns:
        The divergence of every token in nats, [...], fp32, computed in fp32.

    Raises:
        ValueError: The shapes differ.
    """
    if full.shape != other.shape:
        raise ValueError(
            f"cannot compare logits of shapes {tuple(full.shape)} and {tuple(other.shape)}; give both runs "
            "the same tokens"
        )
    log_p, log_q = full.float().log_softmax(-1), other.float().log_softmax(-1)
    p = log_p.exp()
    # A token ruled out by both (logits of -inf) adds nothing, not NaN. Rounding may leave a sum just below zero.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0.0)
