"""Attention to a layer that holds its newest tokens and its sinks in more bits than the rest."""

from __future__ import annotations

from dataclasses import replace

import torch

from hfkv.attention.full import attend_held, kernel_for
from hfkv.attention.softmax_parts import attend
from hfkv.attention.window_blocks import Placed, WindowBlocks
from hfkv.attention.windowed import attended_in_window, by_position
from hfkv.cache.layers.recent import RecentTokens
from hfkv.cache.snapshot import HeldTokens, Part
from hfkv.cache.view import KVView
from hfkv.codecs.autocast import in_own_precision
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.merge import Attended, merge, with_sink_logits


@in_own_precision
def recent_attention(
    query: torch.Tensor, tokens: RecentTokens, pads: tuple[int, ...], scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the newest tokens' queries, each token read in the form that it has for the query.

    Args:
        query: `[B, Hq, q, D]`.
        tokens: the layer's tokens.
        pads: pad tokens of each row.
        scoring: what becomes of scores.

    Returns:
        The output `[B, Hq, q, Dv]` in the wider dtype of queries and keys, and, where wanted, the weights `[B, Hq, q,
        seen]` by position.
    """
    coarse, fine = (held_of(views) for views in (tokens.coarse, tokens.fine))
    query = query.to(torch.promote_types(query.dtype, fine.parts["key"].dtype))
    is_tracked = tokens.coarse[0].requires_grad or tokens.fine[0].requires_grad
    kernel = None if is_tracked else kernel_for(query, coarse, scoring)
    if kernel is None:
        return _decoded(query, tokens, coarse, fine, pads, scoring)
    alone = replace(scoring, sink_logits=None)  # which come once, at the end
    attended = attended_in_window(query, WindowBlocks(fine, pads), alone)
    visibility = coarse_part(tokens, pads)
    # A query that sees something there stands at least so far behind the first one.
    skipped = max(min(visibility.pads) - (visibility.seen - query.shape[2]), 0)
    if skipped < query.shape[2]:
        far = attend_held(kernel, query[:, :, skipped:], coarse, visibility.seen, visibility, alone)
        attended = _merged(attended, far, skipped)
    return with_sink_logits(attended, scoring.sink_logits).out.to(query.dtype), None


def coarse_part(tokens: RecentTokens, pads: tuple[int, ...]) -> Visibility:
    """What queries read in the coarse form: a query at t as a causal one at t - size would see a row behind its sinks.

    So it is said as if the newest tokens had never been, and as if the sinks were padding.
    """
    seen = max(tokens.seen - tokens.recent.size, 0)
    return Visibility(seen=seen, pads=tuple(min(pad + tokens.recent.sinks, seen) for pad in pads))


def _merged(near: Attended, far: Attended, skipped: int) -> Attended:
    """Merges attention of all queries with that of those behind the first `skipped`."""
    if not skipped:
        return merge(near, far)
    merged = merge(Attended(near.out[:, :, skipped:], near.lse[:, :, skipped:]), far)
    out = torch.cat((near.out[:, :, :skipped].to(merged.out.dtype), merged.out), dim=2)
    return Attended(out, torch.cat((near.lse[:, :, :skipped], merged.lse), dim=2))


def _decoded(
    query: torch.Tensor,
    tokens: RecentTokens,
    coarse: HeldTokens,
    fine: HeldTokens,
    pads: tuple[int, ...],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same over decoded tokens, in one softmax, a block of queries at a time."""
    seen, num_queries = tokens.seen, query.shape[2]
    far, near = (WindowBlocks(held, pads, _tracked(views)) for held, views in _both(tokens, coarse, fine))
    keys, values = far.read(0, max(seen - tokens.recent.size, 0))
    outputs, weights = [], []
    block, first = near.block_length(), seen - num_queries
    for begin in range(first, seen, block):
        end = min(begin + block, seen)
        queries = query[:, :, begin - first : end - first]
        placed = near.segments(queries, begin, end)
        last = end - tokens.recent.size
        if last > 0:
            positions = torch.arange(last, device=query.device)[None]
            t = torch.arange(begin, end, device=query.device)[:, None] - tokens.recent.size
            visible = (positions >= near.starts + tokens.recent.sinks)[:, None] & (positions <= t)
            part = far.segment(queries, keys[:, :, :last], values[:, :, :last], visible)
            placed.append(Placed(part, positions))
        attended, parts = attend([place.segment for place in placed], scoring)
        outputs.append(attended)
        if parts is not None:
            weights.append(by_position(parts, placed, seen))
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=2) if weights else None


def _both(
    tokens: RecentTokens, coarse: HeldTokens, fine: HeldTokens
) -> tuple[tuple[HeldTokens, tuple[KVView, KVView]], ...]:
    return (coarse, tokens.coarse), (fine, tokens.fine)


def held_of(views: tuple[KVView, KVView]) -> HeldTokens:
    """The tokens behind the views of one of the two parts."""
    held = views[0].held
    assert isinstance(held, HeldTokens)
    return held


def _tracked(views: tuple[KVView, KVView]) -> dict[Part, torch.Tensor] | None:
    """Keys and values decoded where autograd follows them: a backward pass must find the edge that raises."""
    key, value = views
    return {"key": key.decoded(), "value": value.decoded()} if key.requires_grad or value.requires_grad else None
