"""`Staging`: buffers on a device that pages of host memory pass through, ahead of whoever reads them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfkv.stores.base import allocate
from hfkv.stores.bus import Bus

if TYPE_CHECKING:
    from hfkv.stores.offloaded import OffloadedStore
    from hfkv.stores.tiers import TieredPages

# While one is read, the others fill. 32 MiB take 0.6 ms at 50 GB/s, ten times what it takes to launch what reads them.
BUFFERS, BUFFER_BYTES = 3, 1 << 25
# Planes begin at addresses that vector loads take.
ALIGNMENT = 256


class Wanted(NamedTuple):
    """Pages that are read together.

    Attributes:
        of: whose they are.
        pages: their numbers.
    """

    of: TieredPages
    pages: Sequence[int]


class Buffer:
    """Memory for some pages at a time.

    Attributes:
        planes: `[n, H_i, P, d_i]` in it, of the pages' kind.
        places: where each page is in them.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.of: weakref.ref[TieredPages] | None = None
        self.planes: list[torch.Tensor] = []
        self.places: dict[int, int] = {}
        self.next_place = 0
        self.loaded: Any = None  # what to wait for before it is read
        self.read: Any = None  # up to where the device has been asked to read it
        self.is_read = True  # whether what is in it has been read since it came
        self.in_use = False


class Staging:
    """A few buffers on one device, for all layers of a cache.

    Args:
        bus: the way to the device.
        buffer_bytes: of one buffer, or None; a page that is larger makes it larger.
    """

    def __init__(self, bus: Bus, buffer_bytes: int | None = None) -> None:
        self.bus = bus
        self.buffer_bytes = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
        self.buffers = [Buffer() for _ in range(BUFFERS)]
        self._stores: list[weakref.ref[OffloadedStore]] = []

    def join(self, store: OffloadedStore) -> None:
        """`store` is read after those that have joined before."""
        self._stores = [known for known in self._stores if known() not in (None, store)]
        self._stores.append(weakref.ref(store))

    def capacity(self, pages: TieredPages) -> int:
        """How many pages go into a buffer."""
        return max(_fitting(pages, self.buffer_bytes), 1)

    def bring(self, wanted: Wanted) -> Buffer:
        """A buffer with those pages, once `wait` has been called for it; `release` it when it has been read."""
        buffer = self._load(wanted, self._choose(wanted, must=True))
        buffer.in_use = True
        return buffer

    def wait(self, buffer: Buffer) -> None:
        """What the device is asked to compute from here on may read the buffer."""
        self.bus.wait(buffer.loaded)

    def release(self, buffer: Buffer) -> None:
        """The device has been asked to read it; others may have it after that."""
        buffer.in_use, buffer.is_read = False, True
        buffer.read = self.bus.mark()

    def ahead(self, store: OffloadedStore, rest: Sequence[Wanted]) -> None:
        """Has pages brought that will be wanted next: `rest` of `store`, then those of the stores after it."""
        free = sum(buffer.is_read and not buffer.in_use for buffer in self.buffers)
        for wanted in self._coming(store, rest):
            if free <= 0:
                return
            buffer = self._choose(wanted, must=False)
            if buffer is None:
                return
            free -= buffer.is_read
            self._load(wanted, buffer)
            buffer.is_read = False

    def forget(self, of: TieredPages, pages: Sequence[int]) -> None:
        """Those pages have changed."""
        for buffer in self.buffers:
            if buffer.of is not None and buffer.of() is of:
                for page in pages:
                    buffer.places.pop(page, None)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(0 if buffer.memory is None else buffer.memory.numel() for buffer in self.buffers)

    def _coming(self, store: OffloadedStore, rest: Sequence[Wanted]) -> list[Wanted]:
        coming = list(rest)
        stores = [known for known in (reference() for reference in self._stores) if known is not None]
        if store in stores:
            at = stores.index(store)
            for following in (*stores[at + 1 :], *stores[: at + 1]):
                if len(coming) >= len(self.buffers):
                    break
                coming += following.wanted()
        return coming[: len(self.buffers)]

    def _choose(self, wanted: Wanted, must: bool) -> Buffer | None:
        """The buffer that has most of the pages, or else one that has been read."""
        able = [buffer for buffer in self.buffers if not buffer.in_use]
        known = [(_known(buffer, wanted), index) for index, buffer in enumerate(able)]
        most, index = max(known, default=(0, 0))
        if most:
            buffer = able[index]
            missing = len(wanted.pages) - most
            if buffer.next_place + missing <= len(buffer.planes[0]):
                return buffer
        read = [buffer for buffer in able if buffer.is_read]
        if read or not must:
            return read[0] if read else None
        return able[0]

    def _load(self, wanted: Wanted, buffer: Buffer | None) -> Buffer:
        assert buffer is not None
        pages = wanted.of
        known = _known(buffer, wanted)
        if known == len(wanted.pages):
            return buffer
        if not known or buffer.next_place + len(wanted.pages) - known > len(buffer.planes[0]):
            self._clear(buffer, wanted)
        missing = [page for page in wanted.pages if page not in buffer.places]
        for place, page in enumerate(missing, buffer.next_place):
            buffer.places[page] = place
        buffer.next_place += len(missing)
        slots = {page: pages.slot(page) for page in missing}
        # Of a column some pages may be on the device while others are in host memory.
        there = [(buffer.places[page], slot) for page, slot in slots.items() if slot >= 0]
        if there:
            self.bus.wait(buffer.loaded)  # what is on its way to the buffer may be for the same place
        for place, slot in there:
            for plane, source in zip(buffer.planes, pages.planes, strict=True):
                plane[place] = source[slot]
        away = [(buffer.places[page], ~slot) for page, slot in slots.items() if slot < 0]
        if away:
            buffer.loaded = pages.host.load(away, buffer.planes, after=buffer.read)
        return buffer

    def _clear(self, buffer: Buffer, wanted: Wanted) -> None:
        """Makes the buffer one for pages of this kind, with none in it."""
        pages, needed = wanted.of, _needed(wanted.of, len(wanted.pages))
        if buffer.memory is None or buffer.memory.numel() < needed:
            num_bytes = max(min(2 * needed, self.buffer_bytes), needed)
            buffer.memory = allocate((num_bytes,), torch.uint8, self.bus.device)
        count = max(_fitting(pages, buffer.memory.numel()), len(wanted.pages))
        buffer.planes, first = [], 0
        for plane in pages.planes:
            num_bytes = count * _page_bytes(plane)
            part = buffer.memory[first : first + num_bytes].view(plane.dtype)
            buffer.planes.append(part.view(count, *plane.shape[1:]))
            first += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        buffer.of, buffer.places, buffer.next_place = weakref.ref(pages), {}, 0


def _known(buffer: Buffer, wanted: Wanted) -> int:
    """How many of the pages are in it."""
    if buffer.of is None or buffer.of() is not wanted.of:
        return 0
    return sum(page in buffer.places for page in wanted.pages)


def _page_bytes(plane: torch.Tensor) -> int:
    return plane.element_size() * torch.Size(plane.shape[1:]).numel()


def _fitting(pages: TieredPages, num_bytes: int) -> int:
    """Pages that `num_bytes` are enough for."""
    return max(num_bytes - ALIGNMENT * len(pages.planes), 0) // sum(map(_page_bytes, pages.planes))


def _needed(pages: TieredPages, count: int) -> int:
    """Bytes for so many pages."""
    return sum(-(-count * _page_bytes(plane) // ALIGNMENT) * ALIGNMENT for plane in pages.planes)
