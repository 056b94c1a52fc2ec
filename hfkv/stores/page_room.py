"""`PageRoom`: the pages of a paged store, which are taken from planes that grow and shrink."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from hfkv.stores.base import GROWTH, Store
from hfkv.stores.block_table import BlockTable, Listed
from hfkv.stores.blocks import BlockPool
from hfkv.stores.changes import Change, Changes
from hfkv.stores.pages import Pages

# Shared planes grow by their size divided by this: most of their pages are a prompt that many rows hold together.
SHARED_GROWTH = 16


class PageRoom(Store):
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, of which a block table lists some, and some are free.

    Args:
        page_size: number of tokens a page, P.
        changes: what stores have done that are likely to be in the same state, the layers of a group; None for a store
            by itself.

    Attributes:
        pages: the planes, and which of their pages are free.
        block_table: the pages that rows list, and the tokens held.
    """

    def __init__(
        self,
        page_size: int,
        *,
        bound: int | None = None,
        tokens_innermost: tuple[int, ...] = (),
        changes: Changes | None = None,
    ) -> None:
        self.pages = Pages()
        self.block_table = BlockTable()
        super().__init__(bound=bound, tokens_innermost=tokens_innermost)
        self.pages.stores = 1
        self.page_size = page_size
        self.changes = Changes() if changes is None else changes
        self._copies = (1, 0)
        self._counts = self.pages.blocks  # counts of pages, and what has been done to planes, while a change is made
        self._moves: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

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
    def table(self) -> list[list[int]]:
        """Lists of pages, one a row, with a page a column."""
        return list(self.block_table.rows)

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """The slots ``low <= p < high`` of each column's pages that hold tokens."""
        return self.block_table.columns

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        return self.pages

    def _hold(self, table: BlockTable) -> None:
        self.block_table, self.length = table, table.length

    def _alike(self, asked: tuple[Any, ...], work: Callable[[BlockTable], BlockTable]) -> BlockTable:
        """Works out another block table, or comes to the one that a store in the same state has come to.

        Args:
            asked: what is asked for.
            work: function of the block table that gives the one afterwards. It counts pages in `_counts`, and leaves
                to `_move` what is done to planes.
        """
        pages = self.pages
        with pages:
            asked = (*asked, self.reserved, self.bound, self._copies, pages.stores)
            table, blocks = self.block_table, pages.blocks
            known = self.changes.find(asked, table, blocks)
            if known is not None:
                with contextlib.suppress(MemoryError, torch.OutOfMemoryError):  # there may be memory for less
                    for move, arguments in known.moves:  # each of them does all that it is to do, or nothing
                        move(self, *arguments)
                    pages.blocks = known.blocks_after
                    return known.table_after
            self._counts, self._moves = blocks.copy(), []
            after = work(table)
            if self.reserved == asked[-4]:  # else there was no memory for it
                self.changes.add(Change(asked, table, blocks, after, self._counts, tuple(self._moves)))
            pages.blocks = self._counts
            return after

    def _move(self, move: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function of the store that changes its planes, and remembers it for other layers."""
        move(self, *arguments)
        self._moves.append((move, arguments))

    def _take_columns(self, full: int, has_tail: bool) -> list[list[int]]:
        """Takes new pages for every row: `full` to fill at once, and one to fill token by token if `has_tail`."""
        count, rows = full + has_tail, len(self.block_table.rows)
        pages = self._take(count * rows)
        return [pages[index * count : (index + 1) * count] for index in range(rows)]

    def _take(self, count: int) -> list[int]:
        needed = self._counts.used + count
        if needed > self._counts.size:
            table = self.block_table
            num_listed = len(table.listed)
            reserved = self._reserved_pages(table) + self._counts.used - num_listed
            grown = self._counts.size + self._counts.size // SHARED_GROWTH
            if self.pages.stores == 1 and num_listed == len(table.rows) * len(table.columns):  # no page is shared
                grown = max(int(self._counts.size * GROWTH), reserved)
            self.allocate_reserved(needed, max(needed, grown), self._resize)
        return self._counts.take(count)

    def _reserved_pages(self, table: BlockTable) -> int:
        tokens = self.reserved if self.bound is None else min(self.reserved, self.bound + self.page_size)
        columns = -(-tokens // self.page_size)
        copies, shared = self._copies
        if copies > 1 and self.bound is None:
            columns += (copies - 1) * max(columns - shared // self.page_size, 0)
        return len(table.rows) * columns

    def _resize(self, size: int) -> None:
        _make_planes(self, size)
        size = max(size, len(self.planes[0]))  # planes that were lent may be larger
        self._moves.append((_make_planes, (size,)))
        self._counts.grow(size)

    def _retabled(self, after: tuple[BlockTable, Listed]) -> BlockTable:
        """Counts the pages of another table, and gives it, or the same in smaller planes."""
        table, changes = after
        for pages, more in changes:
            for _ in range(more):
                self._counts.retain(pages)
        for pages, more in changes:
            if more < 0:
                self._counts.release(pages)
        return self._shrunk(table)

    def _shrunk(self, table: BlockTable) -> BlockTable:
        """Moves the pages in use to smaller planes, if many have become free (a window filled, rows went)."""
        size = max(self._counts.used + len(table.rows), self._reserved_pages(table))
        if self.pages.stores > 1 or self._counts.size <= GROWTH * size + len(table.rows):
            return table
        used = sorted(table.listed)
        try:
            self._move(_move_together, used, size)
        except (MemoryError, torch.OutOfMemoryError):
            return table  # there will be another time
        counts = BlockPool()
        counts.refcounts = [self._counts.refcounts[page] for page in used]
        counts.grow(size)
        self._counts = counts
        return table.renumbered({page: index for index, page in enumerate(used)})


def _make_planes(store: PageRoom, size: int) -> None:
    """Makes room for `size` pages: in planes that were lent, or in larger ones."""
    count = len(store.planes[0])
    lent = store.take_lent(store.planes, [(0, size)])
    if count >= size:
        return
    if lent is not None and not count:
        store.planes = lent
        return
    grown = []
    for old in store.planes:
        plane = store.allocate((size, *old.shape[1:]), like=old)
        plane[:count] = old
        grown.append(plane)
    store.planes = grown


def _move_together(store: PageRoom, used: list[int], size: int) -> None:
    """Moves the pages `used` to the front of planes of `size` pages: all planes, or none where there is no memory."""
    smaller = []
    for old in store.planes:
        plane = store.allocate((size, *old.shape[1:]), like=old)
        plane[: len(used)] = old[used]
        smaller.append(plane)
    store.planes = smaller
