"""`TieredPages`: pages of which some lie on a device and the others in host memory."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hfkv.stores.base import GROWTH
from hfkv.stores.blocks import BlockPool
from hfkv.stores.offload.bus import Bus
from hfkv.stores.offload.device import DevicePages, plane_of
from hfkv.stores.offload.host import HostPages, Located, stretches
from hfkv.stores.pages import Pages

Planes = Sequence[torch.Tensor]
Table = list[list[int]]  # [B][column] -> page


class TieredPages(Pages):
    """Pages that are filled on the device and stay there while there is room, or else go to the host once.

    Block tables list pages by number. Only this class knows where each lies, so that a page can move while several
    stores list it. A page moves only when it is full, or when it is to be filled again.

    Args:
        bus: bus to host memory.
        most: the most pages on the device; None for only those that are being filled.
        keeps_newest: whether the device keeps the newest pages, which a window holds longest, and not the oldest.
        like: planes of a page `[.., H_i, P, d_i]` on the device.

    Attributes:
        host, device: pages in host memory, and pages on the device.
        version: number that changes when a page moves.
    """

    def __init__(
        self,
        bus: Bus,
        most: int | None,
        keeps_newest: bool,
        like: Planes,
    ) -> None:
        super().__init__()
        self.blocks = BlockPool(functools.partial(_tell, weakref.ref(self)))
        self.bus, self.keeps_newest = bus, keeps_newest
        self.host = HostPages(bus, like)
        self.device = DevicePages(like, most)
        self.planes = self.device.planes
        self.version = 0
        self.stagings: weakref.WeakSet[Any] = weakref.WeakSet()  # the `Staging`s that may hold pages of these
        self._slots: list[int | None] = []  # each page's slot on the device, or ~slot in host memory
        self._full: dict[int, None] = {}  # pages on the device that are full, the newest last

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an offloaded cache cannot be pickled: save it with cache.save(path)")

    def release(self, pages: Sequence[int]) -> None:
        self.blocks.release(pages)  # which tell these pages what has become free

    @property
    def most(self) -> int | None:
        """The most pages on the device."""
        return self.device.most

    @most.setter
    def most(self, most: int | None) -> None:
        self.device.most = most

    # The places of pages.

    def slot(self, page: int) -> int:
        """The place of a page: a slot on the device, or ``~slot`` in host memory."""
        slot = self._slots[page]
        assert slot is not None
        return slot

    def is_on_device(self, pages: Iterable[int]) -> bool:
        """Whether all of `pages` are on the device."""
        return all(self.slot(page) >= 0 for page in pages)

    def take_columns(self, own: Table, full: int, has_tail: bool, expected: int = 0, rows: int | None = None) -> Table:
        """Takes new pages for every row, one holder each: `full` to fill at once, then one to fill token by token.

        Args:
            own: the block table of the store that asks.
            full: number of columns to fill at once.
            has_tail: whether there is one more column, to fill token by token.
            expected: number of pages that are likely to be held in the end.
            rows: number of rows that get pages; all rows by default.

        Raises:
            MemoryError: there is no memory for the pages; nothing has changed.
        """
        rows, movable = len(own) if rows is None else rows, self._movable(own)
        tail = rows if has_tail else 0
        kept = 0  # columns that stay on the device, as many as leave room for those that are being filled
        if self.most is not None:
            room = self.most - self.device.used - rows + (len(movable) if self.keeps_newest else 0)
            kept = min(full, max(room, 0) // rows)
        self.device.reserve(rows if self.most is None else min(self.most, expected or self.most))
        moved, on_device = self._make_room(tail, rows * kept, len(movable))
        self.host.make_room(
            moved + rows * (full - kept) + tail - on_device, expected=max(expected - (self.most or 0), 0)
        )
        self.device.make_room(rows * kept + on_device)
        self._evict(movable, moved)
        columns = full + has_tail
        pages = self._number(rows * columns)
        table = [pages[row * columns : (row + 1) * columns] for row in range(rows)]
        first = full - kept if self.keeps_newest else 0
        stay = range(first, first + kept)
        # Column by column, as they are read: what comes together lies together.
        self._settle_in([row[column] for column in stay for row in table], on_device=True)
        self._full.update(dict.fromkeys(row[column] for column in stay for row in table))
        go = [column for column in range(full) if column not in stay]
        self._settle_in([row[column] for column in go for row in table], on_device=False)
        tails = [row[-1] for row in table] if has_tail else []
        self._settle_in(tails[:on_device], on_device=True)
        self._settle_in(tails[on_device:], on_device=False)
        return table

    def copy(self, own: Table, pages: Sequence[int]) -> list[int]:
        """Copies `pages`; the copies may be written to. See `take_columns`."""
        content = self.gather(pages)
        fresh = [column[0] for column in self.take_columns(own, 0, True, rows=len(pages))]
        self.fill(fresh, content)
        return fresh

    def close(self, own: Table, pages: Sequence[int], stay: bool = False) -> None:
        """Marks `pages` as full; with `stay` they stay on the device if others do."""
        pages = [page for page in pages if self.slot(page) >= 0 and page not in self._full]
        if stay and self.most is not None and self.most >= 2 * len(pages):
            return
        if self.most is None:
            self.host.make_room(len(self._full) + len(pages))
        self._full.update(dict.fromkeys(pages))
        if self.most is None:
            movable = self._movable(own)
            self._evict(movable, len(movable))

    def open(self, own: Table, pages: Sequence[int]) -> None:
        """Marks `pages`, which no other store lists, as pages that are being filled.

        They come to the device where there is room.
        """
        away = list(dict.fromkeys(page for page in pages if self.slot(page) < 0))
        movable = [page for page in self._movable(own) if page not in pages] if away else []
        moved, on_device = self._make_room(len(away), 0, len(movable))
        away = away[:on_device]
        if away:
            self.host.make_room(moved)
            self.device.make_room(len(away))
            content = self.gather(away)
            self._evict(movable, moved)
            left = [~self.slot(page) for page in away]
            self._settle_in(away, on_device=True)
            self.host.release(left)
            self.fill(away, content)
            self.version += 1
        for page in pages:
            self._full.pop(page, None)

    def shrink(self, spare: int | None) -> None:
        """Gives back host memory that is not in use.

        Args:
            spare: number of slots to keep, where pages will go on coming and going and the others may be moved
                together; None where they may not be moved.
        """
        self.host.trim()
        used = [page for page, slot in enumerate(self._slots) if slot is not None and slot < 0]
        if spare is None or self.stores > 1 or self.host.size <= GROWTH * (len(used) + spare) + spare:
            return
        smaller = HostPages(self.bus, self.planes)
        try:
            smaller.make_room(len(used) + spare)
        except MemoryError:
            return
        self.bus.settle()
        for page, slot in zip(used, smaller.take(len(used)), strict=True):
            for source, target in zip(self.host.page(~self.slot(page)), smaller.page(slot), strict=True):
                target.copy_(source)
            self._slots[page] = ~slot
        self.host = smaller
        self.version += 1

    # The contents of pages.

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
            for plane, states in zip(self.host.page(slot), tokens, strict=True):
                plane[:, first:last].copy_(states[index])
                self.bus.bytes_to_host += states[index].numel() * states.element_size()

    def fill(self, pages: Sequence[int], content: Planes) -> None:
        """Writes n whole `pages`: planes `[n, H_i, P, d_i]`, to which no other code writes."""
        self._changes(pages)
        there, away = self._parted(pages)
        for (begin, end), slot in stretches(there):
            for plane, states in zip(self.planes, content, strict=True):
                plane[slot : slot + end - begin] = states[begin:end]
        self.host.send(away, content)

    def gather(self, pages: Sequence[int], which: slice = slice(None)) -> list[torch.Tensor]:
        """Copies the planes `which` of n pages together on the device, `[n, H_i, P, d_i]`."""
        there, away = self._parted(pages)
        content = [plane_of(len(pages), plane) for plane in self.planes[which]]
        for (begin, end), slot in stretches(there):
            for plane, states in zip(self.planes[which], content, strict=True):
                states[begin:end] = plane[slot : slot + end - begin]
        if away:
            self.bus.wait(self.host.load(away, content, which, self.bus.mark()))
        return content

    def _parted(self, pages: Sequence[int]) -> tuple[list[Located], list[Located]]:
        """Parts `pages` into device pages and host pages: each one's place in the list, and its slot."""
        slots = [self.slot(page) for page in pages]
        there = [(index, slot) for index, slot in enumerate(slots) if slot >= 0]
        return there, [(index, ~slot) for index, slot in enumerate(slots) if slot < 0]

    def _movable(self, own: Table) -> list[int]:
        """The full pages on the device that only `own` lists: another thread may be reading other stores' pages."""
        if self.stores == 1:
            return list(self._full)
        counts = Counter(page for row in own for page in row)
        return [page for page in self._full if self.blocks.refcounts[page] == counts[page]]

    def _make_room(self, count: int, more: int, movable: int) -> tuple[int, int]:
        """The number of pages to move to the host for `count` new ones, and of new ones that find room on the device.

        Args:
            count: number of new pages.
            more: number of slots that others take.
            movable: number of pages that may go.
        """
        if self.most is None:
            return 0, count
        free = self.most - self.device.used - more
        moved = min(max(count - free, 0), movable)
        return moved, max(min(count, free + moved), 0)

    def _evict(self, movable: Sequence[int], count: int) -> None:
        """Moves `count` of the pages `movable` to the host, which has room for them."""
        if not count:
            return
        pages = movable[:count] if self.keeps_newest else movable[-count:]
        content = self.gather(pages)  # the slots may be filled again before it has gone
        slots = [self.slot(page) for page in pages]
        for page in pages:
            del self._full[page]
        self._settle_in(pages, on_device=False)
        self.device.free += slots
        self.host.send([(index, ~self.slot(page)) for index, page in enumerate(pages)], content)
        self.version += 1

    def _number(self, count: int) -> list[int]:
        self.blocks.grow(max(self.blocks.used + count, self.blocks.size))
        self._slots += [None] * (self.blocks.size - len(self._slots))
        return self.blocks.take(count)

    def _settle_in(self, pages: Sequence[int], on_device: bool) -> None:
        """Gives `pages` slots; the caller has made room."""
        taken = self.device.take(len(pages)) if on_device else [~slot for slot in self.host.take(len(pages))]
        for page, slot in zip(pages, taken, strict=True):
            self._slots[page] = slot

    def _changes(self, pages: Sequence[int]) -> None:
        """Makes staging buffers forget `pages`, which change."""
        for staging in list(self.stagings):
            staging.forget(self, pages)

    def freed(self, pages: Sequence[int]) -> None:
        """Frees the slots of `pages`: their last holder is gone."""
        self._changes(pages)
        away = []
        for page in pages:
            slot = self.slot(page)
            self._slots[page] = None
            self._full.pop(page, None)
            if slot >= 0:
                self.device.free.append(slot)
            else:
                away.append(~slot)
        self.host.release(away)


def _tell(of: weakref.ref[TieredPages], pages: list[int]) -> None:
    """Reports freed pages; not a method, by which the pages would hold themselves."""
    tiers = of()
    if tiers is not None:
        tiers.freed(pages)
