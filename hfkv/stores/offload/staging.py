"""`Staging`: buffers on a device that pages of host memory pass through before they are read."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hfkv.stores.offload.bus import Bus
from hfkv.stores.offload.tiers import TieredPages
from hfkv.stores.planes import allocate, has_tokens_innermost, shaped, token_bytes

# While one is read, the others fill. 32 MiB take 0.6 ms at 50 GB/s, ten times the launch of the kernel that reads them.
BUFFERS, BUFFER_BYTES = 3, 1 << 25
# Planes begin at addresses that vector loads take.
ALIGNMENT = 256


class Wanted:
    """Pages that are read together, as long as none of them moves.

    Args:
        of: tiers that the pages belong to.
        pages: numbers of the pages.

    Attributes:
        places: place of each page in a buffer that has nothing else.
    """

    def __init__(self, of: TieredPages, pages: Sequence[int]) -> None:
        self.of, self.pages = of, pages
        self.places = {page: place for place, page in enumerate(pages)}

    @functools.cached_property
    def sources(self) -> list[tuple[int, list[torch.Tensor]]]:
        """The pages in host memory, in stretches: the first one's place, and planes `[n, H_i, P, d_i]`."""
        return self.of.host.stretches([(place, ~slot) for place, slot in self._located if slot < 0])

    @functools.cached_property
    def there(self) -> list[tuple[int, int]]:
        """The place and slot of each page on the device, in a column with other pages in host memory."""
        return [(place, slot) for place, slot in self._located if slot >= 0]

    @property
    def _located(self) -> list[tuple[int, int]]:
        return [(place, self.of.slot(page)) for page, place in self.places.items()]


class Reader(Protocol):
    """A store that is read in turn with others."""

    def wanted(self) -> Sequence[Wanted]:
        """The pages that the store will read next, in pieces."""
        ...


class Buffer:
    """Memory for some pages at a time.

    Attributes:
        planes: planes `[n, H_i, P, d_i]` in the memory, for pages of one kind.
        places: place of each page in the planes.
        holds: the wanted pages, if the planes have all of them and nothing else, or None.
    """

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.of: weakref.ref[TieredPages] | None = None
        self.planes: list[torch.Tensor] = []
        self.places: dict[int, int] = {}
        self.holds: Wanted | None = None
        self.next_place = 0
        self.loaded: Any = None  # copies to wait for before it is read
        self.read: Any = None  # mark of the computation that reads it
        self.is_read = True  # whether its pages have been read since they came
        self.in_use = False

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.memory is None else self.memory.numel()

    def forget(self) -> None:
        """Empties the buffer and gives back its memory."""
        self.memory, self.of, self.planes, self.places, self.holds = None, None, [], {}, None
        self.next_place, self.is_read = 0, True


class Staging:
    """A few buffers on one device, for all layers of a cache.

    Args:
        bus: bus to the device.
        buffer_bytes: number of bytes of one buffer, None for `BUFFER_BYTES`; a larger page makes it larger.
    """

    def __init__(self, bus: Bus, buffer_bytes: int | None = None) -> None:
        self.bus = bus
        self.buffer_bytes = BUFFER_BYTES if buffer_bytes is None else buffer_bytes
        self.buffers = [Buffer() for _ in range(BUFFERS)]
        self._stores: list[weakref.ref[Reader]] = []

    def join(self, store: Reader) -> None:
        """Adds `store`, which is read after the stores that have joined before."""
        self._stores = [known for known in self._stores if known() not in (None, store)]
        self._stores.append(weakref.ref(store))

    def capacity(self, pages: TieredPages) -> int:
        """The number of pages that go into a buffer."""
        return max(_fitting(pages, self.buffer_bytes), 1)

    def bring(self, wanted: Wanted) -> Buffer:
        """Brings pages into a buffer; call `wait` before it is read, and `release` after that.

        Raises:
            MemoryError: there is no memory for a buffer.
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
        """Allocates a buffer for `pages` pages, or for as many as a buffer takes, before they are needed.

        Raises:
            MemoryError: there is no memory for the buffer.
        """
        needed = _needed(of, min(pages, self.capacity(of)))
        if pages and not any(buffer.num_bytes >= needed for buffer in self.buffers):
            self._allocate(self.buffers[0], needed)

    def wait(self, buffer: Buffer) -> None:
        """Makes everything that the device is asked to compute from here on wait until the buffer can be read."""
        self.bus.wait(buffer.loaded)

    def release(self, buffer: Buffer) -> None:
        """Gives the buffer to others, once the device has done what it has been asked to compute so far."""
        buffer.in_use, buffer.is_read = False, True
        buffer.read = self.bus.mark()

    def ahead(self, store: Reader, rest: Sequence[Wanted]) -> None:
        """Starts to bring the pages that will be wanted next: `rest` of `store`, then the next stores' pages."""
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
        """Forgets the copies of pages that have changed."""
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
        """Empties the buffer and cuts it into planes for pages of this kind."""
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
                buffer.planes.append(shaped(part, (count, *plane.shape[1:]), has_tokens_innermost(plane)))
                first += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        buffer.of, buffer.places, buffer.next_place, buffer.holds = weakref.ref(pages), {}, 0, None

    def _allocate(self, buffer: Buffer, needed: int) -> None:
        buffer.forget()
        buffer.memory = allocate((max(min(2 * needed, self.buffer_bytes), needed),), torch.uint8, self.bus.device)
        buffer.read = self.bus.mark()  # a computation with this memory may still be running


def _known(buffer: Buffer, wanted: Wanted) -> int:
    """The number of wanted pages that are in the buffer."""
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
    """The number of pages that fit into `num_bytes`."""
    return max(num_bytes - ALIGNMENT * len(pages.planes), 0) // sum(map(_page_bytes, pages.planes))


def _needed(pages: TieredPages, count: int) -> int:
    """The number of bytes that `count` pages need."""
    return sum(-(-count * _page_bytes(plane) // ALIGNMENT) * ALIGNMENT for plane in pages.planes)
