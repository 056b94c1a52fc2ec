"""`HostPages`: pages in host memory, in segments that never move."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hfkv.stores.offload.bus import Bus
from hfkv.stores.planes import has_tokens_innermost, no_memory, shaped

Planes = Sequence[torch.Tensor]
Located = tuple[int, int]  # a page's index in a list or in planes, and its slot
logger = logging.getLogger("hfkv")

# For pages that come one by one, a segment has the number of slots so far divided by this.
SEGMENT_SHARE = 4


class HostPages:
    """Planes `[N, H_i, P, d_i]` of N slots for pages, cut into segments that are allocated when they are needed.

    Args:
        bus: bus that the pages travel on.
        like: planes of the same kind, `[.., H_i, P, d_i]`.
    """

    def __init__(self, bus: Bus, like: Sequence[torch.Tensor]) -> None:
        self.bus = bus
        self.kinds = [(tuple(plane.shape[1:]), plane.dtype, has_tokens_innermost(plane)) for plane in like]
        self.segments: list[list[torch.Tensor]] = []
        self.begins: list[int] = []  # the first slot of each segment
        self.size = 0
        self._may_reserve = True
        self.free: list[int] = []  # lowest last: pages that come together lie together

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all planes together."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype, _ in self.kinds)

    def make_room(self, count: int, expected: int = 0) -> None:
        """Makes sure that `count` slots are free.

        Args:
            count: number of slots.
            expected: number of slots that are likely to be in use in the end.

        Raises:
            MemoryError: there is no memory for the slots; nothing has changed.
        """
        missing = count - len(self.free)
        if missing <= 0:
            return
        some = self.size // SEGMENT_SHARE
        wanted = expected - self.size if expected - self.size >= missing and self._may_reserve else some
        try:
            self._add(max(missing, wanted))
        except MemoryError as error:
            if wanted <= missing:
                raise
            self._may_reserve = False
            logger.warning("no room to reserve what max_length asks for, growing step by step instead: %s", error)
            self._add(missing)

    def take(self, count: int) -> list[int]:
        """Takes `count` free slots, in order; the caller has made room."""
        return [self.free.pop() for _ in range(count)]

    def release(self, slots: Sequence[int]) -> None:
        """Makes `slots` free."""
        # In place: the garbage collector may release others meanwhile.
        self.free.extend(slots)
        self.free.sort(reverse=True)

    def trim(self) -> None:
        """Gives back the last segments, as long as none of their slots is in use."""
        while self.segments:
            begin = self.begins[-1]
            free = [slot for slot in self.free if slot >= begin]
            if len(free) < self.size - begin:
                return
            self.free = [slot for slot in self.free if slot < begin]
            self.size = begin
            self.bus.settle()
            del self.segments[-1], self.begins[-1]

    def runs(self, slots: Sequence[int]) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yields `slots` in stretches that lie together.

        Returns:
            For each stretch the place of its first slot among `slots`, and its planes `[n, H_i, P, d_i]`.
        """
        start = 0
        for end in range(1, len(slots) + 1):
            if end < len(slots) and slots[end] == slots[end - 1] + 1 and slots[end] not in self.begins:
                continue
            segment = bisect.bisect_right(self.begins, slots[start]) - 1
            first = slots[start] - self.begins[segment]
            yield start, [plane[first : first + end - start] for plane in self.segments[segment]]
            start = end

    def load(self, away: Sequence[Located], into: Planes, which: slice = slice(None), after: Any = None) -> Any:
        """Brings pages into planes `[n, H_i, P, d_i]` on the device.

        Args:
            away: each page's place in the device's planes, and its slot here.
            into: the device's planes.
            which: the pages' planes that `into` stands for.
            after: see `Bus.to_device`.

        Returns:
            The argument for `Bus.wait`.
        """
        return self.bus.to_device(
            [
                (source, target[first : first + len(source)])
                for first, planes in self.stretches(away)
                for source, target in zip(planes[which], into, strict=True)
            ],
            after,
        )

    def send(self, away: Sequence[Located], content: Planes) -> None:
        """Takes pages from planes `[n, H_i, P, d_i]` on the device, to which no other code writes.

        Args:
            away: each page's place in the device's planes, and its slot here.
            content: the device's planes.
        """
        copies = [
            (states[first : first + len(target)], target)
            for first, planes in self.stretches(away)
            for states, target in zip(content, planes, strict=True)
        ]
        if copies:
            self.bus.to_host(copies)

    def stretches(self, away: Sequence[Located]) -> list[tuple[int, list[torch.Tensor]]]:
        """Groups pages that lie together here and there: each stretch's first place there, and its planes here."""
        return [
            (begin + start, planes)
            for (begin, end), slot in stretches(away)
            for start, planes in self.runs(range(slot, slot + end - begin))
        ]

    def page(self, slot: int) -> list[torch.Tensor]:
        """The planes `[H_i, P, d_i]` of one page."""
        _, planes = next(self.runs([slot]))
        return [plane[0] for plane in planes]

    def planes(self) -> list[list[torch.Tensor]]:
        """The segments of each plane."""
        return [[segment[index] for segment in self.segments] for index in range(len(self.kinds))]

    def _add(self, count: int) -> None:
        try:
            with torch.inference_mode(False):
                segment = [
                    shaped(self.bus.allocate((count, *shape), dtype), (count, *shape), is_turned)
                    for shape, dtype, is_turned in self.kinds
                ]
        except MemoryError as error:
            raise no_memory(count * self.page_bytes, "host memory", error) from error
        self.segments.append(segment)
        self.begins.append(self.size)
        self.free = [*range(self.size + count - 1, self.size - 1, -1), *self.free]
        self.size += count


def stretches(places: Sequence[Located]) -> list[tuple[tuple[int, int], int]]:
    """Groups places and slots that both go on: ``((first place, last place + 1), first slot)`` of each stretch."""
    found = []
    start = 0
    for end in range(1, len(places) + 1):
        goes_on = end < len(places) and places[end] == (places[end - 1][0] + 1, places[end - 1][1] + 1)
        if not goes_on:
            found.append(((places[start][0], places[end - 1][0] + 1), places[start][1]))
            start = end
    return found
