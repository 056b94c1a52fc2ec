"""`keep`: fills a layer's slots before tokens leave its window."""

from __future__ import annotations

from dataclasses import replace

import torch

from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.windows.key_positions import SummaryKeys
from hfkv.cache.windows.slots import Slots, starts
from hfkv.cache.windows.summary import page_means, sinks_in_pages, take, where


def retain(held: HeldTokens, gone_below: int) -> None:
    """Copies sinks into their slots, and summarises pages, before their tokens below `gone_below` go.

    Args:
        held: everything that the layer holds, slots included.
        gone_below: position below which no query to come sees a token.
    """
    assert held.window is not None
    window = held.window
    before = held.slots(held.padding.of(held.batch))
    after = replace(before, gone_below=gone_below)
    leaving = before.sinks_leaving(after.held_from, held.device)
    pages = _summaries(held, before, after)
    if leaving is not None:
        held.store.write(0, tuple(take(plane, leaving) for plane in held.store.read()))
    if pages is not None:
        held.store.write(window.sinks, pages)


def _summaries(held: HeldTokens, before: Slots, after: Slots) -> tuple[torch.Tensor, ...] | None:
    """The planes of the summary slots, or None where no page leaves."""
    window = before.window
    if all(after.num_pages(pad) == before.num_pages(pad) for pad in set(before.pads)):
        return None
    pages = after.pages(held.device)
    is_new = (pages != before.pages(held.device))[:, None, :, None]
    first = before.index(starts(before.pads, held.device) + pages * window.summary_page_size)
    keys, values = page_means(
        held.decode("key"),
        held.decode("value"),
        first,
        sinks_in_pages(pages, window),
        window.summary_page_size,
        held.rotary,
    )
    written = SummaryKeys(held.codecs, held.mean, held.origins, after).encode(pages, keys, values)
    slots = slice(window.sinks, window.num_slots)
    there = held.store.read()
    return tuple(where(is_new, new, old[:, :, slots]) for new, old in zip(written, there, strict=True))
