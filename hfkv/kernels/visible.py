"""What a `Visibility` says of a stretch of tokens, for kernels that work on the CPU."""

from __future__ import annotations

import torch

from hfkv.kernels.inputs import Visibility
from hfkv.layout import Layout


def first_seen(visibility: Visibility, layout: Layout) -> tuple[int, ...]:
    """For each row the index of a token before which its queries see none: that is where its text starts."""
    if visibility.mask is not None or visibility.first < visibility.num_slots:
        return (visibility.first,) * len(visibility.pads)
    shift = visibility.num_slots - visibility.held_from
    return tuple(min(max(pad + shift, visibility.first), layout.length) for pad in visibility.pads)


def seen(
    visibility: Visibility, layout: Layout, rows: slice, begin: int, end: int, num_queries: int
) -> torch.Tensor | None:
    """Which of the tokens `begin .. end - 1` the queries of `rows` see.

    Returns:
        Bool `[rows or 1, 1 or Hq, q, end - begin]`; None where each sees all.
    """
    if visibility.mask is not None:
        mask = visibility.mask[rows] if len(visibility.mask) > 1 else visibility.mask
        return mask[..., begin - visibility.first : end - visibility.first]
    pads = visibility.pads[rows]
    oldest_query = visibility.seen - num_queries
    first = visibility.held_from + begin - visibility.num_slots
    if (
        begin >= visibility.num_slots
        and visibility.bounds is None
        and first + end - begin - 1 <= oldest_query
        and max(pads) <= first
    ):
        return None
    starts = torch.tensor(pads if any(pads) else (0,))[:, None, None]  # [rows or 1, 1, 1]
    t = torch.arange(oldest_query, visibility.seen)[:, None]
    newest = torch.arange(first, first + end - begin)
    is_visible = (newest >= starts) & (newest <= t)
    if visibility.bounds is not None:
        bounds = visibility.bounds[rows] if len(visibility.bounds) > 1 else visibility.bounds
        is_visible = is_visible & ((newest >= bounds[:, :, None]) | (newest < starts + visibility.sinks))
    num_slots = min(visibility.num_slots, end) - begin
    if num_slots > 0:
        sinks = starts + torch.arange(begin, begin + num_slots)
        filled = (sinks < visibility.held_from) & (sinks <= t)
        if visibility.bounds is not None:
            filled = filled & ((sinks >= bounds[:, :, None]) | (sinks < starts + visibility.sinks))
        is_visible[..., :num_slots] = filled
    return is_visible[:, None]


def alike(firsts: tuple[int, ...]) -> list[slice]:
    """Rows that go together: all of them, if their texts start at the same token, else each on its own."""
    if len(set(firsts)) == 1:
        return [slice(0, len(firsts))]
    return [slice(row, row + 1) for row in range(len(firsts))]
