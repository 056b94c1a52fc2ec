"""`PageRoom`: the pages of a paged store, which are taken from planes that grow and shrink."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any

import torch

from hfkv.stores.base import GROWTH, Store
from hfkv.stores.blocks import BlockPool
from hfkv.stores.pages import Pages

# Shared planes grow by their size divided by this: most of their pages are a prompt that many rows hold together.
SHARED_GROWTH = 16


class PageRoom(Store):
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, of which rows list some, and some are free.

    Args:
        page_size: number of tokens a page, P.

    Attributes:
        pages: the planes, and which of their pages are free.
        table: by row, the pages that it lists, one a column.
        columns: the slots ``low <= p < high`` of each column's pages that hold tokens.
    """

    def __init__(self, page_size: int, *, bound: int | None = None) -> None:
        self.pages = Pages()
        self.table: list[list[int]] = []
        self.columns: list[tuple[int, int]] = []
        super().__init__(bound=bound)
        self.pages.join(())
        self.page_size = page_size
        self._copies = (1, 0)

    @property
    def planes(self) -> list[torch.Tensor]:
        return self.pages.planes

    @planes.setter
    def planes(self, planes: list[torch.Tensor]) -> None:
        self.pages.planes = planes

    @property
    def blocks(self) -> BlockPool:
        return self.pages.blocks

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        return self.pages.lock

    @abstractmethod
    def _moved(self) -> None:
        """Says that the table is another one."""

    def _take_columns(self, full: int, has_tail: bool) -> list[list[int]]:
        """Takes new pages for every row: `full` to fill at once, and one to fill token by token if `has_tail`."""
        count = full + has_tail
        pages = self._take(count * len(self.table))
        return [pages[index * count : (index + 1) * count] for index in range(len(self.table))]

    def _take(self, count: int) -> list[int]:
        needed = self.blocks.used + count
        if needed > self.blocks.size:
            listed = {page for row in self.table for page in row}
            reserved = self._reserved_pages() + self.blocks.used - len(listed)
            grown = self.blocks.size + self.blocks.size // SHARED_GROWTH
            if self.pages.stores == 1 and len(listed) == len(self.table) * len(self.columns):  # no page is shared
                grown = max(int(self.blocks.size * GROWTH), reserved)
            self.allocate_reserved(needed, max(needed, grown), self._resize)
        return self.blocks.take(count)

    def _reserved_pages(self) -> int:
        tokens = self.reserved if self.bound is None else min(self.reserved, self.bound + self.page_size)
        columns = -(-tokens // self.page_size)
        copies, shared = self._copies
        if copies > 1 and self.bound is None:
            columns += (copies - 1) * max(columns - shared // self.page_size, 0)
        return len(self.table) * columns

    def _resize(self, size: int) -> None:
        lent = self.take_lent(self.planes, [(0, size)])
        if lent is not None and not self.blocks.size:
            self.planes = lent
            return self.blocks.grow(len(lent[0]))
        count = min(size, self.blocks.size)
        grown = []
        for old in self.planes:
            plane = self.allocate((size, *old.shape[1:]), like=old)
            plane[:count] = old[:count]
            grown.append(plane)
        self.planes = grown
        self.blocks.grow(size)

    def _shrink(self) -> None:
        """Moves the pages in use to smaller planes, if many have become free (a window filled, rows went)."""
        size = max(self.blocks.used + len(self.table), self._reserved_pages())
        if self.pages.stores > 1 or self.blocks.size <= GROWTH * size + len(self.table):
            return
        used = sorted({page for row in self.table for page in row})
        place = {page: index for index, page in enumerate(used)}
        for index, old in enumerate(self.planes):
            plane = self.allocate((size, *old.shape[1:]), like=old)
            plane[: len(used)] = old[used]
            self.planes[index] = plane
        refcounts = [self.blocks.refcounts[page] for page in used]
        self.pages.blocks = BlockPool()
        self.blocks.refcounts = refcounts
        self.blocks.grow(size)
        self.table = [[place[page] for page in row] for row in self.table]
        self._moved()
