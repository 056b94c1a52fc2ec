"""`Attended`: attention to stretches of tokens, and how they are merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Attended(NamedTuple):
    """The result of attention to some of the tokens.

    Attributes:
        out: output `[..., q, Dv]`, zeros where a query sees none of them.
        lse: logarithm of the sum of the exponentials of scores, float32 `[..., q]`; -inf where a query sees none.
    """

    out: torch.Tensor
    lse: torch.Tensor


def nothing(query: torch.Tensor, head_dim: int) -> Attended:
    """The result for queries `[..., q, D]` that see nothing."""
    out = query.new_zeros(*query.shape[:-1], head_dim)
    return Attended(out, torch.full(query.shape[:-1], -torch.inf, dtype=torch.float32, device=query.device))


def merge(one: Attended, other: Attended) -> Attended:
    """Merges attention to two sets of tokens; `out` is in float32."""
    lse = torch.logaddexp(one.lse, other.lse)
    weights = (_share(part.lse, lse) for part in (one, other))
    out, more = (part.out * weight for part, weight in zip((one, other), weights, strict=True))
    return Attended(out + more, lse)


def merge_all(parts: Iterable[Attended]) -> Attended | None:
    """Merges attention to any number of sets of tokens, one after the other; None where there are none."""
    merged: Attended | None = None
    for part in parts:
        merged = part if merged is None else merge(merged, part)
    return merged


def with_sink_logits(attended: Attended, logits: torch.Tensor | None) -> Attended:
    """Adds one logit a head that takes weight and has no value, `[Hq]`; `attended` is `[B, Hq, q, Dv]`."""
    if logits is None:
        return attended
    lse = torch.logaddexp(attended.lse, logits.float()[:, None])
    return Attended(attended.out * _share(attended.lse, lse), lse)


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The share of `part` in `whole` as weights `[..., 1]`, float32; 0 where `part` is nothing."""
    return (part - whole).exp_().masked_fill_(part == -torch.inf, 0)[..., None]
