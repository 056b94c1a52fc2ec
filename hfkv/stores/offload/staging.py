"""`Staging`: buffers on a device that pages of host memory pass through, ahead of whoever reads them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hfkv.stores.base import allocate, token_bytes
from hfkv.stores.offload.bus import Bus
from hfkv.stores.offload.tiers import TieredPages

# While one is read, the others fill. 32 MiB take 0.6 ms at 50 GB/s, ten times what it takes to launch what reads them.
BUFFERS, BUFFER_BYTES = 3, 1 << 25
# Planes begin at addresses that vector loads take.
ALIGNMENT = 256


class Wanted:
    """Pages that are read together, as long as none of them moves.

    Args:
        of: whose they are.
        pages: their numbers.

    Attributes:
        places: where each is in a buffer that has nothing else.
    """

    def __init__(self, of: TieredPages, pages: Sequence[int]) -> None:
        self.of, self.pages = of, pages
        self.places = {page: place for place, page in enumerate(pages)}

    @functools.cached_property
    def sources(self) -> list[tuple[int, list[torch.Tensor]]]:
        """Those in host memory, in stretches: the first's place, and planes `[n, H_i, P, d_i]`."""
        return self.of.host.stretches([(place, ~slot) for place, slot in self._located if slot < 0])

    @functools.cached_property
    def there(self) -> list[tuple[int, int]]:
        """Those on the device, in a column of which others are in host memory: place and slot."""
        return [(place, slot) for place, slot in self._located if slot >= 0]

    @property
    def _located(self) -> list[tuple[int, int]]:
        return [(place, self.of.slot(page)) for page, place in self.places.items()]


class Reader(Protocol):
    """A store that is read in turn with others."""

    def wanted(self) -> Sequence[Wanted]:
        """The pages it will read next, in pieces."""
        ...


class Buffer:
    """Memory for some pages at a time.

    Attributes:
        planes: `[n, H_i, P, d_i]` in it, of the pages' kind.
        places: where each page is in them.
        holds: what alone is in them and whole, or None.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.of: weakref.ref[TieredPages] | None = None
        self.planes: list[torch.Tensor] = []
        self.places: dict[int, int] = {}
        self.holds: Wanted | None = None
        self.next_place = 0
        self.loaded: Any = None  # what to wait for before it is read
        self.read: Any = None  # up to where the device has been asked to read it
        self.is_read = True  # whether what is in it has been read since it came
        self.in_use = False

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.memory is None else self.memory.numel()

    def forget(self) -> None:
        """Nothing is in it any more, and its memory is given back."""
        self.memory, self.of, self.planes, self.places, self.holds = None, None, [], {}, None
        self.next_place, self.is_read = 0, True


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
        self._stores: list[weakref.ref[Reader]] = []

    def join(self, store: Reader) -> None:
        """`store` is read after those that have joined before."""
        self._stores = [known for known in self._stores if known() not in (None, store)]
        self._stores.append(weakref.ref(store))

    def capacity(self, pages: TieredPages) -> int:
        """How many pages go into a buffer."""
        return max(_fitting(pages, self.buffer_bytes), 1)

    def bring(self, wanted: Wanted) -> Buffer:
        """A buffer with those pages, once `wait` has been called for it; `release` it when it has been read.

        Raises:
            MemoryError: there is no memory for one.
        """
        buffer = self._choose(wanted, must=True)
        assert buffer is not None
        try:
            self._load(wanted, buffer)
        except MemoryError:
            needed = _needed(wanted.of, len(wanted.pages))
            able = [other for other in self.buffers if not other.in_use and other.num_bytes >= needed]
            if not able:
                raise
            buffer = able[0]
            self._load(wanted, buffer)
        buffer.in_use = True
        return buffer

    def expect(self, of: TieredPages, pages: int) -> None:
        """Sees to one buffer for so many pages, or as many as a buffer takes, before they are needed.

        Raises:
            MemoryError: there is no memory for it.
        """
        needed = _needed(of, min(pages, self.capacity(of)))
        if pages and not any(buffer.num_bytes >= needed for buffer in self.buffers):
            self._allocate(self.buffers[0], needed)

    def wait(self, buffer: Buffer) -> None:
        """What the device is asked to compute from here on may read the buffer."""
        self.bus.wait(buffer.loaded)

    def release(self, buffer: Buffer) -> None:
        """The device has been asked to read it; others may have it after that."""
        buffer.in_use, buffer.is_read = False, True
        buffer.read = self.bus.mark()

    def ahead(self, store: Reader, rest: Sequence[Wanted]) -> None:
        """Has pages brought that will be wanted next: `rest` of `store`, then those of the stores after it."""
        free = sum(buffer.is_read and not buffer.in_use for buffer in self.buffers)
        for wanted in self._coming(store, rest):
            if free <= 0:
                return
            buffer = self._choose(wanted, must=False)
            if buffer is None:
                return
            free -= buffer.is_read
            try:
                self._load(wanted, buffer)
            except MemoryError:
                return  # it is brought when it is needed
            buffer.is_read = False

    def forget(self, of: TieredPages, pages: Sequence[int]) -> None:
        """Those pages have changed."""
        for buffer in self.buffers:
            if buffer.of is not None and buffer.of() is of and not buffer.places.keys().isdisjoint(pages):
                buffer.holds = None
                for page in pages:
                    buffer.places.pop(page, None)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.num_bytes for buffer in self.buffers)

    def _coming(self, store: Reader, rest: Sequence[Wanted]) -> list[Wanted]:
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

    def _load(self, wanted: Wanted, buffer: Buffer) -> None:
        known = _known(buffer, wanted)
        if known == len(wanted.pages):
            return
        if not known or buffer.next_place + len(wanted.pages) - known > len(buffer.planes[0]):
            self._clear(buffer, wanted)
            buffer.places, buffer.next_place = dict(wanted.places), len(wanted.pages)
            buffer.holds, first = wanted, 0
        else:  # some pages have come to those that were wanted before
            wanted = Wanted(wanted.of, [page for page in wanted.pages if page not in buffer.places])
            buffer.holds, first = None, buffer.next_place
            buffer.places |= {page: first + place for page, place in wanted.places.items()}
            buffer.next_place += len(wanted.pages)
        if wanted.there:
            self.bus.wait(buffer.loaded)  # what is on its way to the buffer may be for the same place
            for place, slot in wanted.there:
                for plane, source in zip(buffer.planes, wanted.of.planes, strict=True):
                    plane[first + place] = source[slot]
            buffer.read = self.bus.mark()
        copies = [
            (source, plane[first + place : first + place + len(source)])
            for place, sources in wanted.sources
            for source, plane in zip(sources, buffer.planes, strict=True)
        ]
        if copies:
            buffer.loaded = self.bus.to_device(copies, after=buffer.read)

    def _clear(self, buffer: Buffer, wanted: Wanted) -> None:
        """Makes the buffer one for pages of this kind, with none in it."""
        pages, needed = wanted.of, _needed(wanted.of, len(wanted.pages))
        if buffer.num_bytes < needed:
            self._allocate(buffer, needed)
        assert buffer.memory is not None
        count = max(_fitting(pages, buffer.num_bytes), len(wanted.pages))
        if buffer.of is None or buffer.of() is not pages or len(buffer.planes[0]) != count:
            buffer.planes, first = [], 0
            for plane in pages.planes:
                num_bytes = count * _page_bytes(plane)
                part = buffer.memory[first : first + num_bytes].view(plane.dtype)
                buffer.planes.append(part.view(count, *plane.shape[1:]))
                first += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        buffer.of, buffer.places, buffer.next_place, buffer.holds = weakref.ref(pages), {}, 0, None

    def _allocate(self, buffer: Buffer, needed: int) -> None:
        buffer.forget()
        buffer.memory = allocate((max(min(2 * needed, self.buffer_bytes), needed),), torch.uint8, self.bus.device)
        buffer.read = self.bus.mark()  # whoever had that memory before may still be computing with it


def _known(buffer: Buffer, wanted: Wanted) -> int:
    """How many of the pages are in it."""
    if buffer.holds is wanted:
        return len(wanted.pages)
    if buffer.of is None or buffer.of() is not wanted.of:
        return 0
    # Pages come and go at the ends: where neither is there, none is.
    if wanted.pages[0] not in buffer.places and wanted.pages[-1] not in buffer.places:
        return 0
    return sum(page in buffer.places for page in wanted.pages)


def _page_bytes(plane: torch.Tensor) -> int:
    return plane.shape[2] * token_bytes(plane)


def _fitting(pages: TieredPages, num_bytes: int) -> int:
    """Pages that `num_bytes` are enough for."""
    return max(num_bytes - ALIGNMENT * len(pages.planes), 0) // sum(map(_page_bytes, pages.planes))


def _needed(pages: TieredPages, count: int) -> int:
    """Bytes for so many pages."""
    return sum(-(-count * _page_bytes(plane) // ALIGNMENT) * ALIGNMENT for plane in pages.planes)
