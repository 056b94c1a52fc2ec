"""Attention to several stretches of tokens, put together."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Attended(NamedTuple):
    """What queries attend to in some of the tokens.

    Attributes:
        out: `[..., q, Dv]`, zeros where a query sees none of them.
        lse: float32 `[..., q]`, the logarithm of the sum of the exponentials of the scores; -inf where it sees none.
    """

    out: torch.Tensor
    lse: torch.Tensor


def nothing(query: torch.Tensor, head_dim: int) -> Attended:
    """Of queries `[..., q, D]` that see nothing."""
    out = query.new_zeros(*query.shape[:-1], head_dim)
    return Attended(out, torch.full(query.shape[:-1], -torch.inf, dtype=torch.float32, device=query.device))


def merge(one: Attended, other: Attended) -> Attended:
    """Attention to the tokens of both, `out` in float32."""
    lse = torch.logaddexp(one.lse, other.lse)
    weights = (_share(part.lse, lse) for part in (one, other))
    out, more = (part.out * weight for part, weight in zip((one, other), weights, strict=True))
    return Attended(out + more, lse)


def with_sink_logits(attended: Attended, logits: torch.Tensor | None) -> Attended:
    """With a logit a head that takes weight and has no value, `[Hq]`; `attended` is `[B, Hq, q, Dv]`."""
    if logits is None:
        return attended
    lse = torch.logaddexp(attended.lse, logits.float()[:, None])
    return Attended(attended.out * _share(attended.lse, lse), lse)


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The share of `part` in `whole` as weights `[..., 1]`, float32; 0 of nothing."""
    return (part - whole).exp_().masked_fill_(part == -torch.inf, 0)[..., None]
