"""`TieredPages`: pages of which some lie on a device and the others in host memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hfkv.stores.base import allocate
from hfkv.stores.blocks import BlockPool
from hfkv.stores.bus import Bus
from hfkv.stores.host import HostPages, Located, stretches
from hfkv.stores.pages import Pages

if TYPE_CHECKING:
    from hfkv.stores.staging import Staging

Planes = Sequence[torch.Tensor]


class TieredPages(Pages):
    """Pages that are filled on the device, and stay there while there is room; else they go to the host, once.

    Block tables list pages by number. Where each lies is known here alone, so that a page can move while several
    stores list it. A page moves only when it is full, or when it is to be filled again.

    Args:
        bus: the way to host memory.
        most: pages on the device at most; None for those alone that are being filled.
        keeps_newest: whether those on the device are to be the newest, which a window holds longest; else the oldest.
        like: planes of a page `[.., H_i, P, d_i]` on the device.

    Attributes:
        host: the pages in host memory.
        version: changes when a page moves.
    """

    def __init__(
        self,
        bus: Bus,
        most: int | None,
        keeps_newest: bool,
        like: Planes,
    ) -> None:
        super().__init__()
        self.blocks = _Blocks(self)
        self.bus, self.most, self.keeps_newest = bus, most, keeps_newest
        self.host = HostPages(bus, like)
        self.planes = [_plane(0, plane) for plane in like]
        self.version = 0
        self.stagings: weakref.WeakSet[Staging] = weakref.WeakSet()
        self._slots: list[int | None] = []  # of each page: a slot on the device, or ~slot in host memory
        self._free: list[int] = []  # slots on the device
        self._full: dict[int, None] = {}  # pages on the device that are full, the newest last

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an offloaded cache cannot be pickled: save it with cache.save(path)")

    # Where pages are.

    def slot(self, page: int) -> int:
        """Where a page is: a slot on the device, or ``~slot`` in host memory."""
        slot = self._slots[page]
        assert slot is not None
        return slot

    def is_on_device(self, pages: Iterable[int]) -> bool:
        """Whether all of `pages` are."""
        return all(self.slot(page) >= 0 for page in pages)

    def take_columns(self, rows: int, full: int, has_tail: bool, expected: int) -> list[list[int]]:
        """New pages for every row, with one holder each: `full` to be filled at once, then one to be filled by and by.

        Args:
            rows: B.
            full: columns.
            has_tail: whether there is one more.
            expected: pages that are likely to be held in the end.

        Raises:
            MemoryError: there is no memory for them; nothing has changed.
        """
        tail = rows if has_tail else 0
        kept = 0  # columns that stay on the device, as many as leave room for those that are being filled
        if self.most is not None:
            room = self.most - self._used - rows + (len(self._full) if self.keeps_newest else 0)
            kept = min(full, max(room, 0) // rows)
        self._expect(rows, expected)
        moved, on_device = self._make_room(tail, rows * kept)
        self.host.make_room(moved + rows * (full - kept) + tail - on_device, self._host_expected(expected))
        self._allocate_device(rows * kept + on_device)
        self._evict(moved)
        columns = full + has_tail
        pages = self._number(rows * columns)
        table = [pages[row * columns : (row + 1) * columns] for row in range(rows)]
        first = full - kept if self.keeps_newest else 0
        stay = range(first, first + kept)
        self._settle_in([row[column] for row in table for column in stay], on_device=True)
        self._full.update(dict.fromkeys(row[column] for column in stay for row in table))
        go = [column for column in range(full) if column not in stay]
        self._settle_in([row[column] for row in table for column in go], on_device=False)
        tails = [row[-1] for row in table] if has_tail else []
        self._settle_in(tails[:on_device], on_device=True)
        self._settle_in(tails[on_device:], on_device=False)
        return table

    def copy(self, pages: Sequence[int]) -> list[int]:
        """Copies of `pages`, to be written to; see `take_columns`."""
        content = self.gather(pages)
        fresh = [row[0] for row in self.take_columns(len(pages), 0, True, 0)]
        self.fill(fresh, content)
        return fresh

    def close(self, pages: Sequence[int], stay: bool = False) -> None:
        """Says that `pages` have been filled, and whether they are to stay on the device if others do."""
        pages = [page for page in pages if self.slot(page) >= 0 and page not in self._full]
        if stay and self.most is not None and self.most >= 2 * len(pages):
            return
        self._full.update(dict.fromkeys(pages))
        if self.most is None:
            self.host.make_room(len(pages))
            self._evict(len(pages))

    def open(self, pages: Sequence[int]) -> None:
        """Says that `pages` are to be written to again and again: they come to the device where there is room."""
        for page in pages:
            self._full.pop(page, None)
        away = list(dict.fromkeys(page for page in pages if self.slot(page) < 0))
        moved, on_device = self._make_room(len(away), 0)
        away = away[:on_device]
        if not away:
            return
        self.host.make_room(moved)
        self._allocate_device(len(away))
        content = self.gather(away)
        self._evict(moved)
        left = [~self.slot(page) for page in away]
        self._settle_in(away, on_device=True)
        self.host.release(left)
        self.fill(away, content)
        self.version += 1

    # What is in them.

    def write(self, pages: Sequence[int], first: int, tokens: Planes) -> None:
        """Writes tokens `[n, H_i, t, d_i]` from slot `first` of n `pages` on."""
        self._changes(pages)
        last = first + tokens[0].shape[2]
        there, away = self._parted(pages)
        for (begin, end), slot in stretches(there):
            for plane, states in zip(self.planes, tokens, strict=True):
                plane[slot : slot + end - begin, :, first:last] = states[begin:end]
        if away:
            self.bus.settle()
        for index, slot in away:
            _, planes = next(self.host.runs([slot]))
            for plane, states in zip(planes, tokens, strict=True):
                plane[0, :, first:last].copy_(states[index])
                self.bus.bytes_to_host += states[index].numel() * states.element_size()

    def fill(self, pages: Sequence[int], content: Planes) -> None:
        """Writes n whole `pages`: planes `[n, H_i, P, d_i]` that nobody else writes to."""
        self._changes(pages)
        there, away = self._parted(pages)
        for (begin, end), slot in stretches(there):
            for plane, states in zip(self.planes, content, strict=True):
                plane[slot : slot + end - begin] = states[begin:end]
        self.host.send(away, content)

    def gather(self, pages: Sequence[int], which: slice = slice(None)) -> list[torch.Tensor]:
        """The planes `which` of n pages, `[n, H_i, P, d_i]`, copied together on the device."""
        there, away = self._parted(pages)
        content = [plane.new_empty((len(pages), *plane.shape[1:])) for plane in self.planes[which]]
        for (begin, end), slot in stretches(there):
            for plane, states in zip(self.planes[which], content, strict=True):
                states[begin:end] = plane[slot : slot + end - begin]
        if away:
            self.bus.wait(self.host.load(away, content, which, self.bus.mark()))
        return content

    def _parted(self, pages: Sequence[int]) -> tuple[list[Located], list[Located]]:
        """Those of `pages` on the device and those in host memory: of each its place in the list, and its slot."""
        slots = [self.slot(page) for page in pages]
        there = [(index, slot) for index, slot in enumerate(slots) if slot >= 0]
        return there, [(index, ~slot) for index, slot in enumerate(slots) if slot < 0]

    @property
    def _used(self) -> int:
        """Slots in use on the device."""
        return len(self.planes[0]) - len(self._free)

    def _host_expected(self, expected: int) -> int:
        return max(expected - (self.most or 0), 0)

    def _make_room(self, count: int, more: int) -> tuple[int, int]:
        """How many pages are to go to the host for `count` that are to be filled, of which so many find room.

        Args:
            count: pages.
            more: slots that others take.
        """
        if self.most is None:
            return 0, count
        free = self.most - self._used - more
        moved = min(max(count - free, 0), len(self._full))
        return moved, max(min(count, free + moved), 0)

    def _expect(self, rows: int, expected: int) -> None:
        """Reserves slots on the device for as many pages as will stay there."""
        wanted = rows if self.most is None else self.most if expected == 0 else min(self.most, expected)
        if len(self.planes[0]) == 0 and wanted > 0:
            self._resize(wanted)

    def _allocate_device(self, count: int) -> None:
        """Sees to `count` free slots on the device, those of pages that are to go apart."""
        needed = self._used + count
        if self.most is not None:
            needed = min(needed, self.most)
        if needed > len(self.planes[0]):
            self._resize(needed)

    def _resize(self, size: int) -> None:
        grown = []
        for old in self.planes:
            plane = _plane(size, old)
            plane[: len(old)] = old
            grown.append(plane)
        self._free = [*range(size - 1, len(self.planes[0]) - 1, -1), *self._free]
        self.planes = grown

    def _evict(self, count: int) -> None:
        """Moves full pages to the host, which has room for them."""
        if not count:
            return
        pages = list(self._full)
        pages = pages[:count] if self.keeps_newest else pages[-count:]
        for page in pages:
            del self._full[page]
        slots = [self.slot(page) for page in pages]
        content = self.gather(pages)  # the slots may be filled again before it has gone
        self._settle_in(pages, on_device=False)
        self._free += slots
        self.host.send([(index, ~self.slot(page)) for index, page in enumerate(pages)], content)
        self.version += 1

    def _number(self, count: int) -> list[int]:
        self.blocks.grow(max(self.blocks.used + count, self.blocks.size))
        self._slots += [None] * (self.blocks.size - len(self._slots))
        return self.blocks.take(count)

    def _settle_in(self, pages: Sequence[int], on_device: bool) -> None:
        """Gives `pages` slots, which are there."""
        taken = [self._free.pop() for _ in pages] if on_device else [~slot for slot in self.host.take(len(pages))]
        for page, slot in zip(pages, taken, strict=True):
            self._slots[page] = slot

    def _changes(self, pages: Sequence[int]) -> None:
        """What has been brought of `pages` no longer holds."""
        for staging in self.stagings:
            staging.forget(self, pages)

    def freed(self, pages: Sequence[int]) -> None:
        """The last holder of `pages` is gone."""
        self._changes(pages)
        away = []
        for page in pages:
            slot = self.slot(page)
            self._slots[page] = None
            self._full.pop(page, None)
            if slot >= 0:
                self._free.append(slot)
            else:
                away.append(~slot)
        self.host.release(away)


class _Blocks(BlockPool):
    """Says which blocks have become free."""

    def __init__(self, pages: TieredPages) -> None:
        super().__init__()
        self._pages = weakref.ref(pages)

    def release(self, blocks: Iterable[int]) -> None:
        before = len(self.free)
        super().release(blocks)
        pages = self._pages()
        if pages is not None and len(self.free) > before:
            pages.freed(self.free[before:])


def _plane(size: int, like: torch.Tensor) -> torch.Tensor:
    return allocate((size, *like.shape[1:]), like.dtype, like.device)
