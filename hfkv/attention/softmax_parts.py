"""Attention over several stretches of keys as if they were one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hfkv.kernels.inputs import Scoring
from hfkv.kernels.merge import Attended


class SoftmaxPart(NamedTuple):
    """A stretch of keys and values, and the queries as they look at it.

    Attributes:
        query: `[B, Hq, q, D]`.
        key, value: `[B, H, n, D]` and `[B, H, n, Dv]`, Hq a multiple of H.
        visible: bool `[B or 1, q, n]`; None, in a segment on its own, where every query sees every key.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None


def attend(segments: Sequence[SoftmaxPart], scoring: Scoring) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """One softmax over the keys of all segments.

    Every query must see at least one key.

    Returns:
        The output `[B, Hq, q, Dv]`, and, where wanted, the weights over each segment, `[B, Hq, q, n]`.
    """
    if scoring.is_plain and all(segment.query is segments[0].query for segment in segments):
        return _sdpa(_joined(segments), scoring), None
    num_heads, num_queries = segments[0].query.shape[1:3]
    scores = torch.cat([_scores(segment, scoring) for segment in segments], dim=-1)
    if scoring.sink_logits is not None:
        heads = segments[0].key.shape[1]
        logits = scoring.sink_logits.to(scores.dtype).view(1, heads, -1, 1, 1)
        logits = logits.expand(scores.shape[0], -1, -1, num_queries, -1).flatten(2, 3)
        weights = torch.cat((scores, logits), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights.to(segments[0].value.dtype), p=scoring.dropout, training=scoring.dropout > 0)
    parts = weights.split([segment.key.shape[2] for segment in segments], dim=-1)
    output: torch.Tensor = sum(part @ segment.value for part, segment in zip(parts, segments, strict=True))
    unfolded = [_unfold(part, num_heads) for part in parts] if scoring.weights else None
    return _unfold(output, num_heads), unfolded


def attend_apart(segments: Sequence[SoftmaxPart], scoring: Scoring) -> Attended:
    """One softmax over the keys of all segments, to be merged with others; a query may see none of them."""
    num_heads = segments[0].query.shape[1]
    scores = torch.cat([_scores(segment, scoring, hidden=-torch.inf) for segment in segments], dim=-1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    parts = weights.split([segment.key.shape[2] for segment in segments], dim=-1)
    output: torch.Tensor = sum(
        part @ segment.value.to(part.dtype) for part, segment in zip(parts, segments, strict=True)
    )
    return Attended(_unfold(output, num_heads), _unfold(lse[..., None], num_heads)[..., 0])


def _joined(segments: Sequence[SoftmaxPart]) -> SoftmaxPart:
    """Segments of the same queries as one; a copy, unless there is but one."""
    if len(segments) == 1:
        return segments[0]
    key, value = (torch.cat([getattr(segment, part) for segment in segments], dim=2) for part in ("key", "value"))
    masks = [segment.visible for segment in segments]
    batch = max(len(mask) for mask in masks if mask is not None)
    visible = torch.cat([mask.expand(batch, -1, -1) for mask in masks if mask is not None], dim=-1)
    return SoftmaxPart(segments[0].query, key, value, visible)


def _scores(segment: SoftmaxPart, scoring: Scoring, hidden: float | None = None) -> torch.Tensor:
    """The scores; what is not seen scores `hidden`, the dtype's least by default: then any row has a softmax."""
    query = _fold(segment.query, segment.key.shape[1])
    scores = (query * scoring.scale) @ segment.key.transpose(2, 3)  # scaled first: in half precision it may overflow
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    mask = _fold_mask(segment)
    return (
        scores
        if mask is None
        else scores.masked_fill_(~mask, torch.finfo(scores.dtype).min if hidden is None else hidden)
    )


def _sdpa(segment: SoftmaxPart, scoring: Scoring) -> torch.Tensor:
    query = _fold(segment.query, segment.key.shape[1])
    output = F.scaled_dot_product_attention(
        query, segment.key, segment.value, _fold_mask(segment), dropout_p=scoring.dropout, scale=scoring.scale
    )
    return _unfold(output, segment.query.shape[1])


def _fold(query: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Folds `[B, Hq, q, D]` to `[B, H, Hq / H * q, D]`: queries of one kv head side by side, no key repeated."""
    return query.reshape(query.shape[0], num_heads, -1, query.shape[3])


def _unfold(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Unfolds `[B, H, Hq / H * q, n]` to `[B, Hq, q, n]`."""
    return states.reshape(states.shape[0], num_heads, -1, states.shape[3])


def _fold_mask(segment: SoftmaxPart) -> torch.Tensor | None:
    if segment.visible is None:
        return None
    groups = segment.query.shape[1] // segment.key.shape[1]
    return segment.visible[:, None].repeat(1, 1, groups, 1)
