"""`WindowBlocks`: the rule of a window as stretches of keys, for a block of queries at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hfkv.attention.softmax_parts import SoftmaxPart
from hfkv.cache.snapshot import HeldTokens, Part
from hfkv.cache.windows.key_positions import SummaryKeys
from hfkv.cache.windows.slots import NOWHERE, starts
from hfkv.cache.windows.summary import page_means, sinks_in_pages, take

MIN_BLOCK, MAX_BLOCK = 64, 512  # queries
FEW_MORE = 128  # keys no query sees, cheaper to mask than to leave out


@dataclass(frozen=True)
class Placed:
    """A segment and the positions of its keys, int64 `[B or 1, n]`; None where they have none."""

    segment: SoftmaxPart
    positions: torch.Tensor | None


class WindowBlocks:
    """What queries see of the tokens held.

    Args:
        held: the layer's tokens; without a window they are all there.
        pads: pad tokens of each row.
        tracked: the keys and values of `held` decoded, where autograd follows them; else they are decoded when needed.
    """

    def __init__(
        self, held: HeldTokens, pads: tuple[int, ...], tracked: Mapping[Part, torch.Tensor] | None = None
    ) -> None:
        self.held, self.tracked = held, tracked
        self.window = held.window
        self.pads = pads
        self.sinks = self.window.sinks if self.window else 0
        self.slots = held.slots(pads) if self.window else None
        self.num_slots = (self.window.num_slots if self.window else 0) - held.first  # that are among the keys
        self.device = held.device
        self.is_turned = self.window is not None and self.window.sink_positions == "cache" and self.sinks > 0
        self._sinks: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def has_more_than_tokens(self) -> bool:
        """Whether sinks are looked at differently from the newest tokens, or there are summaries."""
        return self.is_turned or (self.window is not None and self.window.summary is not None)

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """The position of each row's first real token, int64 `[B or 1, 1]`."""
        return starts(self.pads if any(self.pads) else (0,), self.device)

    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the tokens `first .. last - 1` of those shown, `[B, H, n, D]`."""
        if self.tracked is not None:
            return self.tracked["key"][:, :, first:last], self.tracked["value"][:, :, first:last]
        return self.held.decode("key", first, last), self.held.decode("value", first, last)

    def segment(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None
    ) -> SoftmaxPart:
        """A stretch of decoded keys and values as queries meet it."""
        # Under autocast a model caches float32 keys, rotated by float32 angles, beside half-precision values.
        keys, values = (states.to(query.dtype) for states in self.held.joined(keys, values))
        return SoftmaxPart(query, keys, values, visible)

    def _read_around(self, index: torch.Tensor, size: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of a range that has the `size` tokens from each of `index` on, and `index` within it."""
        last = self.held.last - self.held.first
        first = min(max(int(index.min()), 0), last - 1)
        last = max(min(int(index.max()) + size, last), first + 1)
        return *self.read(first, last), index - first

    def block_length(self) -> int:
        """Queries looked at together: about half a window, so that little is computed in vain."""
        return min(max(self.window.capacity() // 2, MIN_BLOCK), MAX_BLOCK) if self.window else MAX_BLOCK

    def sees_all_held(self, t: int) -> bool:
        """Whether a query at `t` of any row sees every key there is, each as it lies."""
        if any(self.pads) or self.has_more_than_tokens:
            return False
        if self.window is None:
            return True
        slots_seen = self.slots.sinks_filled or self.num_slots == 0  # type: ignore[union-attr]
        return slots_seen and self.held.held_from >= self.window.lower_bound(t)

    def segments(self, query: torch.Tensor, begin: int, end: int) -> list[Placed]:
        """The stretches that queries at `begin .. end - 1` see, `query` `[B, Hq, end - begin, D]`."""
        t = torch.arange(begin, end, device=self.device)
        bounds = self.lower_bounds(begin, end)  # [B or 1, q]
        # A pad token is before its row's bound and sees itself.
        oldest = max(self.held.held_from, min(begin, *(int(bound) for bound in bounds[:, 0].tolist())))
        if oldest - self.held.held_from > FEW_MORE or self.has_more_than_tokens:
            return self._apart(query, t, bounds, oldest, end)
        return [self._together(query, t, bounds, end)]

    def beside(self, query: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, list[SoftmaxPart]]:
        """What is attended to besides the newest tokens, where a kernel takes those: sinks and summaries.

        Returns:
            The first of the newest tokens that each query sees, int64 `[B or 1, q]`, and the other segments.
        """
        t = torch.arange(begin, end, device=self.device)
        bounds = newest = self.lower_bounds(begin, end)
        placed = []
        if self.sinks:
            placed.append(self._sink_segment(query, t, bounds, bounds))
            newest = torch.maximum(bounds, self.starts + self.sinks) if self.is_turned else bounds
        if self.window and self.window.summary:
            placed += self._summary_segments(query, bounds)
        return newest, [place.segment for place in placed]

    def _together(self, query: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor, end: int) -> Placed:
        """Slots and newest tokens as they lie, in one stretch."""
        newest = torch.arange(self.held.held_from, end, device=self.device)[None]
        positions = newest
        if self.num_slots:
            slots = self.slots.sink_positions(self.device)  # type: ignore[union-attr]
            positions = torch.cat((slots, newest.expand(len(slots), -1)), dim=1)
        count = positions.shape[1]
        visible = self._visible(positions, t, bounds) & (positions != NOWHERE)[:, None]
        return Placed(self.segment(query, *self.read(0, count), visible), positions)

    def _apart(self, query: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor, oldest: int, end: int) -> list[Placed]:
        """Sinks, summaries and the newest tokens from `oldest` on, each a segment of its own."""
        shift = self.num_slots - self.held.held_from
        positions = torch.arange(oldest, end, device=self.device)[None]
        visible = self._visible(positions, t, bounds)
        if self.is_turned:
            is_sink = (positions >= self.starts) & (positions < self.starts + self.sinks)
            visible &= ~is_sink[:, None]
        placed = [Placed(self.segment(query, *self.read(oldest + shift, end + shift), visible), positions)]
        if self.sinks and (self.is_turned or oldest > min(self.pads)):
            placed.append(self._sink_segment(query, t, bounds, torch.full_like(bounds, oldest)))
        if self.window and self.window.summary:
            placed += self._summary_segments(query, bounds)
        return placed

    def _sink_segment(self, query: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor, before: torch.Tensor) -> Placed:
        """The sinks, turned, or else those below `before` `[B or 1, q]`."""
        if self._sinks is None:
            # Where each sink is: in its slot, or still among the newest tokens.
            slots = self.slots
            assert slots is not None
            leaving = slots.sinks_leaving(self.held.seen, self.device)
            own = torch.arange(self.sinks, device=self.device).expand(len(self.pads), -1)
            index = (own if leaving is None else leaving) - self.held.first
            keys, values, index = self._read_around(index)
            index = index.clamp(0, keys.shape[2] - 1)
            self._sinks = take(keys, index), take(values, index)
        positions = self.starts + torch.arange(self.sinks, device=self.device)
        visible = positions[:, None] <= t[:, None]
        if self.is_turned:
            turned = self._turned(query, bounds)
        else:
            turned, visible = query, visible & (positions[:, None] < before[..., None])
        return Placed(self.segment(turned, *self._sinks, visible), positions)

    def _turned(self, query: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """The queries at the positions they would have if the text between sinks and window had never been."""
        gap = (bounds - self.starts - self.sinks).clamp_min(0)
        rotary = self.held.rotary
        if rotary is None:
            return query
        if rotary.part == "key":
            return rotary.rotate(query, -gap[:, None])
        # What meets rotary keys comes last.
        width = self.held.parts["value"].head_dim
        rest, turned = query.split((query.shape[-1] - width, width), dim=-1)
        return torch.cat((rest, rotary.rotate(turned, -gap[:, None])), dim=-1)

    def _summary_segments(self, query: torch.Tensor, bounds: torch.Tensor) -> list[Placed]:
        """The summaries in the slots, and those of pages that have left a query's window and are still held."""
        window, slots = self.window, self.slots
        assert window is not None
        assert slots is not None
        size = window.summary_page_size
        placed = []
        if self.num_slots:
            pages = slots.pages(self.device)
            visible = self._visible_pages(pages, bounds)
            held = self.read(window.sinks, window.num_slots)
            placed.append(Placed(self.segment(query, *held, visible), None))
        # Pages that the last of these queries no longer sees token by token, and that have no slot yet.
        firsts = torch.tensor([slots.num_pages(pad) for pad in self.pads], device=self.device)[:, None]
        lasts = (bounds - self.starts)[:, -1:] // size
        oldest = (bounds - self.starts)[:, :1] // size - window.summary_pages
        firsts = torch.maximum(firsts, oldest)
        count = int((lasts - firsts).max())
        if count > 0:
            pages = firsts + torch.arange(count, device=self.device)
            visible = self._visible_pages(pages, bounds)
            index = slots.index(self.starts + pages * size) - self.held.first
            sinks = sinks_in_pages(pages, window)
            keys, values, index = self._read_around(index, size)
            means = page_means(keys, values, index, sinks, size, self.held.rotary)
            keys, values = self._as_written(pages, *means)
            placed.append(Placed(self.segment(query, keys, values, visible), None))
        return placed

    def _visible_pages(self, pages: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Marks the summaries each query sees, `[B, q, N]`: the newest of pages wholly below its lower bound."""
        assert self.window is not None
        size = self.window.summary_page_size
        gone = ((bounds - self.starts) // size)[..., None]  # [B, q, 1]
        pages = pages[:, None]
        has_text = (pages + 1) * size > self.sinks
        return (pages >= 0) & (pages < gone) & (pages >= gone - self.window.summary_pages) & has_text

    def _as_written(
        self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the summaries of `pages` as they will be read from their slots."""
        held = self.held
        assert self.slots is not None
        return SummaryKeys(held.codecs, held.mean, held.origins, self.slots).as_read(pages, keys, values)

    def lower_bounds(self, begin: int, end: int) -> torch.Tensor:
        """L(t) for the queries at `begin .. end - 1` of each row, int64 `[B or 1, q]`, in positions with padding."""
        if self.window is None:
            return torch.zeros(1, end - begin, dtype=torch.long, device=self.device)
        t = torch.arange(begin, end, device=self.device) - self.starts  # within a row's own text
        steps = self.window.sizes.steps
        if steps is None:
            bounds = self._asked(begin, end) * (t >= 0)
        else:
            parts = [((t + 1).clamp_max(last) - size) * (t + 1 >= first) for first, last, size in steps]
            bounds = torch.stack(parts).amax(0).clamp_min(0)
        return self.starts + bounds

    def _asked(self, begin: int, end: int) -> torch.Tensor:
        """L(t) of a schedule of one's own for the queries at `begin .. end - 1`, each row counted from its start."""
        assert self.window is not None
        by_pad = {pad: [self.window.lower_bound(t - pad) for t in range(begin, end)] for pad in set(self.pads)}
        return torch.tensor([by_pad[pad] for pad in self.pads], device=self.device)

    def _visible(self, positions: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """The rule, bool `[B or 1, q, n]`; a pad token, which nothing attends to, sees itself."""
        j, t = positions[:, None], t[:, None]
        is_sink = j < (self.starts + self.sinks)[..., None]
        real = (j >= self.starts[..., None]) & (j <= t) & ((j >= bounds[..., None]) | is_sink)
        return real | ((j == t) & (t < self.starts[..., None])) if any(self.pads) else real
