"""Attention under a window: by a kernel, or a block of queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from hfkv.attention.full import attend_held, kernel_for
from hfkv.attention.softmax_parts import attend, attend_apart
from hfkv.attention.window_blocks import Placed, WindowBlocks
from hfkv.cache.snapshot import HeldTokens, Part
from hfkv.codecs.autocast import in_own_precision
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.merge import Attended, merge, with_sink_logits


@in_own_precision
def windowed_attention(
    query: torch.Tensor,
    held: HeldTokens,
    pads: tuple[int, ...],
    scoring: Scoring,
    tracked: Mapping[Part, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the newest tokens' queries to what the window lets them see; O(q · window).

    Args:
        query: `[B, Hq, q, D]`.
        held: the layer's tokens; without a window they are all there.
        pads: pad tokens of each row.
        scoring: what becomes of scores.
        tracked: keys and values of `held` decoded, `[B, H, T, D]`, where autograd follows them.

    Returns:
        The output `[B, Hq, q, Dv]` in the wider dtype of queries and keys, and, where wanted, the weights `[B, Hq, q,
        seen]` by position; summaries take weight and have no position.
    """
    # A cache that was filled outside autocast may hold wider keys than the queries under it are.
    query = query.to(torch.promote_types(query.dtype, held.parts["key"].dtype))
    look = WindowBlocks(held, pads, tracked)
    num_queries = query.shape[2]
    first = held.seen - num_queries
    sees_all = num_queries == 1 and look.sees_all_held(first)
    kernel = kernel_for(query, held, scoring) if tracked is None else None
    if kernel is not None and held.kernel(query).reads_moved_windows:
        return _by_kernel(kernel, query, look, scoring, sees_all).out, None
    if sees_all and scoring.is_plain:
        return attend([look.segment(query, *look.read(0, held.last - held.first), None)], scoring)[0], None
    outputs, weights = [], []
    block = look.block_length()
    for begin in range(first, held.seen, block):
        end = min(begin + block, held.seen)
        segments = look.segments(query[:, :, begin - first : end - first], begin, end)
        attended, parts = attend([segment.segment for segment in segments], scoring)
        outputs.append(attended)
        if parts is not None:
            weights.append(by_position(parts, segments, held.seen))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output, torch.cat(weights, dim=2) if weights else None


def attended_in_window(query: torch.Tensor, look: WindowBlocks, scoring: Scoring) -> Attended:
    """The same attention with its log-sum-exp, to be merged with others.

    Args:
        query: `[B, Hq, q, D]` in a dtype that holds the keys'.
        look: what the window lets the newest tokens' queries see.
        scoring: what becomes of scores, without sink logits, dropout and weights.
    """
    held, num_queries = look.held, query.shape[2]
    first = held.seen - num_queries
    kernel = kernel_for(query, held, scoring)
    if kernel is not None and held.kernel(query).reads_moved_windows:
        return _by_kernel(kernel, query, look, scoring, num_queries == 1 and look.sees_all_held(first))
    block, blocks = look.block_length(), []
    for begin in range(first, held.seen, block):
        end = min(begin + block, held.seen)
        placed = look.segments(query[:, :, begin - first : end - first], begin, end)
        blocks.append(attend_apart([place.segment for place in placed], scoring))
    return _one_after_the_other(blocks, query.dtype)


def visibility_of(look: WindowBlocks, num_queries: int) -> Visibility:
    """What the newest queries see, except turned sinks and summaries."""
    held = look.held
    return Visibility(
        seen=held.seen,
        pads=look.pads,
        first=held.first,
        held_from=held.held_from,
        num_slots=held.window.num_slots if held.window else 0,
        sinks=look.sinks,
        bounds=look.lower_bounds(held.seen - num_queries, held.seen) if held.window else None,
    )


def _by_kernel(
    kernel: Callable[..., Attended], query: torch.Tensor, look: WindowBlocks, scoring: Scoring, sees_all: bool
) -> Attended:
    held = look.held
    if sees_all:
        visibility = Visibility(seen=held.last, pads=(0,) * held.batch, first=held.first)
        return attend_held(kernel, query, held, held.last, visibility, scoring)
    num_queries = query.shape[2]
    begin = held.seen - num_queries
    visibility = visibility_of(look, num_queries)
    if not look.has_more_than_tokens:
        return attend_held(kernel, query, held, held.last, visibility, scoring)
    outputs = []
    block = look.block_length()
    for start in range(begin, held.seen, block):
        end = min(start + block, held.seen)
        queries = query[:, :, start - begin : end - begin]
        bounds, segments = look.beside(queries, start, end)
        newest = replace(visibility, seen=end, first=visibility.num_slots, sinks=0, bounds=bounds)
        last = visibility.num_slots + end - held.held_from
        alone = replace(scoring, sink_logits=None)
        attended = attend_held(kernel, queries, held, last, newest, alone)
        if segments:  # without sinks there are no others as long as no page has left
            attended = merge(attended, attend_apart(segments, alone))
        outputs.append(with_sink_logits(attended, scoring.sink_logits))
    return _one_after_the_other(outputs, query.dtype)


def _one_after_the_other(blocks: list[Attended], dtype: torch.dtype) -> Attended:
    """The attention of blocks of queries as that of all."""
    out, lse = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*blocks, strict=True))
    return Attended(out.to(dtype), lse)


def by_position(parts: list[torch.Tensor], placed: list[Placed], seen: int) -> torch.Tensor:
    """Weights over the segments as weights over all positions, `[B, Hq, q, seen]`."""
    batch, heads, num_queries = parts[0].shape[:3]
    weights = parts[0].new_zeros(batch, heads, num_queries, seen)
    for part, place in zip(parts, placed, strict=True):
        if place.positions is not None:
            # Slots that are not filled have no weight: any place will do.
            index = place.positions.clamp(0, seen - 1)[:, None, None].expand(batch, heads, num_queries, -1)
            weights.scatter_add_(3, index, part)
    return weights
