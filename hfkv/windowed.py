"""Attention under a window: the rule over what a layer holds, a block of queries at a time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hfkv.held import HeldTokens
from hfkv.segments import Scoring, Segment, attend
from hfkv.slots import NOWHERE, starts
from hfkv.summary import page_means, sinks_in_pages, take

MIN_BLOCK, MAX_BLOCK = 64, 512  # queries
FEW_MORE = 128  # keys nobody sees, cheaper to mask than to leave out


def windowed_attention(
    query: torch.Tensor,
    held: HeldTokens,
    keys: torch.Tensor,
    values: torch.Tensor,
    pads: tuple[int, ...],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the newest tokens' queries to what the window lets them see; O(q · window).

    Args:
        query: `[B, Hq, q, D]`.
        held: the layer's tokens; without a window they are all there.
        keys, values: `held` decoded, `[B, H, T, D]`.
        pads: pad tokens of each row.
        scoring: what becomes of scores.

    Returns:
        The output `[B, Hq, q, Dv]`, and, where wanted, the weights `[B, Hq, q, seen]` by position; summaries take
        weight and have no position.
    """
    look = _Look(held, keys, values, pads)
    num_queries = query.shape[2]
    first = held.seen - num_queries
    if num_queries == 1 and scoring.is_plain and look.sees_all_held(first):
        return attend([Segment(query, keys, values, None)], scoring)[0], None
    outputs, weights = [], []
    block = look.block_length()
    for begin in range(first, held.seen, block):
        end = min(begin + block, held.seen)
        segments = look.segments(query[:, :, begin - first : end - first], begin, end)
        attended, parts = attend([segment.segment for segment in segments], scoring)
        outputs.append(attended)
        if parts is not None:
            weights.append(_by_position(parts, segments, held.seen))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output, torch.cat(weights, dim=2) if weights else None


@dataclass(frozen=True)
class _Placed:
    """A segment and the positions of its keys, int64 `[B or 1, n]`; None where they have none."""

    segment: Segment
    positions: torch.Tensor | None


class _Look:
    """What queries see of the tokens held."""

    def __init__(self, held: HeldTokens, keys: torch.Tensor, values: torch.Tensor, pads: tuple[int, ...]) -> None:
        self.held, self.keys, self.values = held, keys, values
        self.window = held.window
        self.pads = pads
        self.sinks = self.window.sinks if self.window else 0
        self.slots = held.slots(pads) if self.window else None
        self.num_slots = (self.window.num_slots if self.window else 0) - held.first  # that are among the keys
        self.device = keys.device
        self.is_turned = self.window is not None and self.window.sink_positions == "cache" and self.sinks > 0
        self._sinks: tuple[torch.Tensor, torch.Tensor] | None = None

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """The position of each row's first real token, int64 `[B or 1, 1]`."""
        return starts(self.pads if any(self.pads) else (0,), self.device)

    def block_length(self) -> int:
        """Queries looked at together: about half a window, so that little is computed in vain."""
        return min(max(self.window.capacity() // 2, MIN_BLOCK), MAX_BLOCK) if self.window else MAX_BLOCK

    def sees_all_held(self, t: int) -> bool:
        """Whether a query at `t` of any row sees every key there is, each as it lies."""
        if any(self.pads) or self.is_turned or (self.window and self.window.summary):
            return False
        if self.window is None:
            return True
        slots_seen = self.slots.sinks_filled or self.num_slots == 0  # type: ignore[union-attr]
        return slots_seen and self.held.held_from >= self.window.lower_bound(t)

    def segments(self, query: torch.Tensor, begin: int, end: int) -> list[_Placed]:
        """The stretches that queries at `begin .. end - 1` see, `query` `[B, Hq, end - begin, D]`."""
        t = torch.arange(begin, end, device=self.device)
        bounds = self._lower_bounds(begin, end)  # [B or 1, q]
        # A pad token is before its row's bound and sees itself.
        oldest = max(self.held.held_from, min(begin, *(int(bound) for bound in bounds[:, 0].tolist())))
        if oldest - self.held.held_from > FEW_MORE or self.is_turned or (self.window and self.window.summary):
            return self._apart(query, t, bounds, oldest, end)
        return [self._together(query, t, bounds, end)]

    def _together(self, query: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor, end: int) -> _Placed:
        """Slots and newest tokens as they lie, in one stretch."""
        newest = torch.arange(self.held.held_from, end, device=self.device)[None]
        positions = newest
        if self.num_slots:
            slots = self.slots.sink_positions(self.device)  # type: ignore[union-attr]
            positions = torch.cat((slots, newest.expand(len(slots), -1)), dim=1)
        count = positions.shape[1]
        visible = self._visible(positions, t, bounds) & (positions != NOWHERE)[:, None]
        return _Placed(Segment(query, self.keys[:, :, :count], self.values[:, :, :count], visible), positions)

    def _apart(
        self, query: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor, oldest: int, end: int
    ) -> list[_Placed]:
        """Sinks, summaries and the newest tokens from `oldest` on, each on their own."""
        shift = self.num_slots - self.held.held_from
        newest = slice(oldest + shift, end + shift)
        positions = torch.arange(oldest, end, device=self.device)[None]
        visible = self._visible(positions, t, bounds)
        if self.is_turned:
            is_sink = (positions >= self.starts) & (positions < self.starts + self.sinks)
            visible &= ~is_sink[:, None]
        placed = [_Placed(Segment(query, self.keys[:, :, newest], self.values[:, :, newest], visible), positions)]
        if self.sinks and (self.is_turned or oldest > min(self.pads)):
            placed.append(self._sink_segment(query, t, bounds, oldest))
        if self.window and self.window.summary:
            placed += self._summary_segments(query, bounds)
        return placed

    def _sink_segment(self, query: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor, oldest: int) -> _Placed:
        if self._sinks is None:
            # Where each sink is: in its slot, or still among the newest tokens.
            slots = self.slots
            assert slots is not None
            leaving = slots.sinks_leaving(self.held.seen, self.device)
            own = torch.arange(self.sinks, device=self.device).expand(len(self.pads), -1)
            index = (own if leaving is None else leaving) - self.held.first
            index = index.clamp(0, self.keys.shape[2] - 1)
            self._sinks = take(self.keys, index), take(self.values, index)
        positions = self.starts + torch.arange(self.sinks, device=self.device)
        visible = positions[:, None] <= t[:, None]
        if self.is_turned:
            turned = self._turned(query, bounds)
        else:
            turned, visible = query, visible & (positions < oldest)[:, None]
        return _Placed(Segment(turned, *self._sinks, visible), positions)

    def _turned(self, query: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """The queries at the positions they would have if the text between sinks and window had never been."""
        gap = (bounds - self.starts - self.sinks).clamp_min(0)
        return query if self.held.rotary is None else self.held.rotary.rotate(query, -gap[:, None])

    def _summary_segments(self, query: torch.Tensor, bounds: torch.Tensor) -> list[_Placed]:
        """The summaries in the slots, and those of pages that have left a query's window and are still held."""
        window, slots = self.window, self.slots
        assert window is not None
        assert slots is not None
        size = window.summary_page_size
        placed = []
        if self.num_slots:
            pages = slots.pages(self.device)
            where = slice(window.sinks, window.num_slots)
            visible = self._visible_pages(pages, bounds)
            placed.append(_Placed(Segment(query, self.keys[:, :, where], self.values[:, :, where], visible), None))
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
            means = page_means(self.keys, self.values, index, sinks, size, self.held.rotary)
            keys, values = (self._as_written(states) for states in means)
            placed.append(_Placed(Segment(query, keys, values, visible), None))
        return placed

    def _visible_pages(self, pages: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Which summaries each query sees, `[B, q, N]`: the newest of pages wholly below its lower bound."""
        assert self.window is not None
        size = self.window.summary_page_size
        gone = ((bounds - self.starts) // size)[..., None]  # [B, q, 1]
        pages = pages[:, None]
        has_text = (pages + 1) * size > self.sinks
        return (pages >= 0) & (pages < gone) & (pages >= gone - self.window.summary_pages) & has_text

    def _as_written(self, states: torch.Tensor) -> torch.Tensor:
        """`states` as they will be read from their slots."""
        codec = self.held.codec
        return codec.decode(codec.encode(states), states.shape[3], states.dtype)

    def _lower_bounds(self, begin: int, end: int) -> torch.Tensor:
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
        """L of a schedule of one's own for the queries at `begin .. end - 1`, each row counted from its start."""
        assert self.window is not None
        by_pad = {pad: [self.window.lower_bound(t - pad) for t in range(begin, end)] for pad in set(self.pads)}
        return torch.tensor([by_pad[pad] for pad in self.pads], device=self.device)

    def _visible(self, positions: torch.Tensor, t: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """The rule, bool `[B or 1, q, n]`; a pad token, which nobody listens to, sees itself."""
        j, t = positions[:, None], t[:, None]
        is_sink = j < (self.starts + self.sinks)[..., None]
        real = (j >= self.starts[..., None]) & (j <= t) & ((j >= bounds[..., None]) | is_sink)
        return real | ((j == t) & (t < self.starts[..., None])) if any(self.pads) else real


def _by_position(parts: list[torch.Tensor], placed: list[_Placed], seen: int) -> torch.Tensor:
    """Weights over the segments as weights over all positions, `[B, Hq, q, seen]`."""
    batch, heads, num_queries = parts[0].shape[:3]
    weights = parts[0].new_zeros(batch, heads, num_queries, seen)
    for part, place in zip(parts, placed, strict=True):
        if place.positions is not None:
            # Slots that are not filled have no weight: any place will do.
            index = place.positions.clamp(0, seen - 1)[:, None, None].expand(batch, heads, num_queries, -1)
            weights.scatter_add_(3, index, part)
    return weights
