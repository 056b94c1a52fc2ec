"""Visibility of the tokens in a stretch, for kernels that work on the CPU."""

from __future__ import annotations

import torch

from hfkv.kernels.inputs import Visibility
from hfkv.stores.layout import Layout


def first_seen(visibility: Visibility, layout: Layout) -> tuple[int, ...]:
    """The index in each row before which its queries see no token: the start of its text."""
    if visibility.mask is not None or visibility.first < visibility.num_slots:
        return (visibility.first,) * len(visibility.pads)
    shift = visibility.num_slots - visibility.held_from
    return tuple(min(max(pad + shift, visibility.first), layout.length) for pad in visibility.pads)


def seen(
    visibility: Visibility, layout: Layout, rows: slice, begin: int, end: int, num_queries: int
) -> torch.Tensor | None:
    """Marks which of the tokens `begin .. end - 1` the queries of `rows` see.

    Returns:
        Bool `[rows or 1, 1 or Hq, q, end - begin]`; None where each sees all.
    """
    if visibility.mask is not None:
        mask = visibility.mask[rows] if len(visibility.mask) > 1 else visibility.mask
        return mask[..., begin - visibility.first : end - visibility.first]
    pads, bounds = visibility.pads[rows], bounds_of(visibility, rows, begin)
    oldest_query = visibility.seen - num_queries
    first = visibility.held_from + begin - visibility.num_slots
    is_newest = begin >= visibility.num_slots
    if is_newest and bounds is None and first + end - begin - 1 <= oldest_query and max(pads) <= first:
        return None
    starts = torch.tensor(pads if any(pads) else (0,))[:, None, None]  # [rows or 1, 1, 1]
    t = torch.arange(oldest_query, visibility.seen)[:, None]
    positions = torch.arange(first, first + end - begin).expand(len(starts), 1, -1)
    if not is_newest:
        slots = torch.arange(begin, end)
        is_slot = slots < visibility.num_slots
        in_slots = starts + slots
        # A slot that is not filled is nowhere: behind every query.
        in_slots = torch.where(in_slots < visibility.held_from, in_slots, visibility.seen)
        positions = torch.where(is_slot, in_slots, positions)
    is_visible = (positions >= starts) & (positions <= t)
    if bounds is not None:
        is_visible = is_visible & ((positions >= bounds[:, :, None]) | (positions < starts + visibility.sinks))
    return is_visible[:, None]


def bounds_of(visibility: Visibility, rows: slice, begin: int) -> torch.Tensor | None:
    """The lower bounds of the queries of `rows`, `[rows or 1, q]`; None where all tokens from `begin` on are above."""
    if visibility.bounds is None:
        return None
    bounds = visibility.bounds[rows] if len(visibility.bounds) > 1 else visibility.bounds
    is_newest = begin >= visibility.num_slots
    first = visibility.held_from + begin - visibility.num_slots
    return None if is_newest and int(bounds.max()) <= first else bounds


def alike(firsts: tuple[int, ...], at_most: int, near: int) -> list[slice]:
    """Groups rows: up to `at_most` neighbours where all texts start `near` to each other, else single rows.

    Args:
        firsts: start of each row's text.
        at_most: the most rows in a group.
        near: the most tokens between the first start and the last.
    """
    size = max(at_most, 1) if max(firsts) - min(firsts) <= near else 1
    return [slice(row, min(row + size, len(firsts))) for row in range(0, len(firsts), size)]
