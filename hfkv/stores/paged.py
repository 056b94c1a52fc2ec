"""`PagedStore`: pages of tokens behind a block table, shared by reference and copied on write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hfkv.stores.base import Placing, Planes
from hfkv.stores.layout import Layout, bits_of, spans_without
from hfkv.stores.page_room import PageRoom
from hfkv.stores.page_slots import PageSlots, copy_slots


class PagedStore(PageRoom):
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, and for each row a list of pages: its block table.

    All rows hold tokens of the same positions, so one list of columns `[low, high)` says which tokens of a page
    are held, for every row. Copies of rows (beams) and of the whole store (`fork`) share pages; a shared page that is
    written to is copied first. Dropping frees whole pages; a page cut in two by a drop is listed twice.

    Args:
        page_size: number of tokens a page, P.
    """

    is_paged = True

    def __init__(self, page_size: int, *, bound: int | None = None) -> None:
        super().__init__(page_size, bound=bound)
        self._ids: torch.Tensor | None = None  # the table as int64 [B, columns], made when it is needed
        self._key: object = None  # the table and the full columns, to compare; made when it is needed

    def __del__(self) -> None:
        if "table" in vars(self):  # else it was never made whole
            self.pages.leave(page for row in self.table for page in row)

    def __deepcopy__(self, memo: Any) -> PagedStore:
        return self.fork(torch.arange(len(self.table)))

    def fork(self, rows: torch.Tensor) -> PagedStore:
        forked = self._empty()
        with self.lock:
            forked.pages.leave(())
            forked.pages = self.pages
            forked.table = [list(self.table[row]) for row in rows.tolist()]
            forked.pages.join(page for row in forked.table for page in row)
            forked.columns, forked.length, forked.device = list(self.columns), self.length, self.device
        return forked

    def expect_copies(self, copies: int, tokens: int) -> None:
        self._copies = (copies, tokens)

    def append(self, new: Planes) -> None:
        with self.lock:
            if not self.planes:
                self._begin(new)
            count, first, last = new[0].shape[2], len(self.columns), self.length
            slot = self.columns[-1][1] if self.columns else self.page_size
            head = min(count, self.page_size - slot)
            full, tail = divmod(count - head, self.page_size)
            # What may find no memory comes first: then nothing has changed.
            end = head + full * self.page_size
            whole = [tokens[:, :, head:end].unflatten(2, (full, self.page_size)) for tokens in new] if full else []
            content = self._pages_of(whole)
            self.extend(count)
            try:
                if head:
                    self._write([row[first - 1] for row in self.table], slot, [tokens[:, :, :head] for tokens in new])
                if full:
                    pages = [row[column] for column in range(first, first + full) for row in self.table]
                    self._fill(pages, content)
                if tail:
                    self._write([row[-1] for row in self.table], 0, [tokens[:, :, count - tail :] for tokens in new])
            except BaseException:
                self.truncate(last)
                raise

    @property
    def extent(self) -> object:
        if not self.columns or self.is_offloaded:
            return None
        if self._key is None:
            self._key = tuple(map(tuple, self.table)), tuple(self.columns[:-1])
        # Pages that are copied before they are written to, and those that the copies are made in.
        rows = self._rows_to_copy(-1) if self.has_shared_end else []
        fresh = self.blocks.free[: -len(rows) - 1 : -1]
        return self.length, self.columns[-1], self._key, tuple(rows), tuple(fresh) if rows else ()

    @property
    def has_shared_end(self) -> bool:
        return bool(self.columns) and self.pages.blocks.is_any_shared([row[-1] for row in self.table])

    def placing(self, count: int, start: int, stop: int) -> Placing | None:
        extent: Any = self.extent
        if extent is None or stop > start or count > self._room():
            return None  # columns begin or go
        *_, rows, fresh = extent
        if len(fresh) < len(rows):
            return None  # planes have to grow
        return PageSlots(self.layout(), self.planes, count, self._key, rows, fresh)

    def put(self, placing: Placing, new: Planes | None) -> None:
        assert isinstance(placing, PageSlots)
        with self.pages.lock:
            if placing.fresh:
                self._take_copies(placing)
            placing.write(self.pages.planes, new or ())
        # One key for all layers, which is equal to itself at a glance.
        self.length, self.columns[-1], self._ids, self._key = placing.length, placing.column, placing.table, placing.key

    def read_placed(self, placing: Placing, first: int, last: int) -> Planes:
        assert isinstance(placing, PageSlots)
        return placing.read(self.pages.planes, first, last)

    def is_used_elsewhere(self) -> Callable[[], bool]:
        return self.pages.are_used

    def extend(self, count: int) -> Layout:
        with self.lock:
            before = self.layout()
            head = min(count, self._room())
            full, tail = divmod(count - head, self.page_size)
            # What may find no memory comes first: then nothing has changed.
            if head:
                self._own(-1)
            if full or tail:
                for row, pages in zip(self.table, self._take_columns(full, tail > 0), strict=True):
                    row.extend(pages)
                self._moved()
            if head:
                low, high = self.columns[-1]
                self.columns[-1] = (low, high + head)
            self.columns += [(0, self.page_size)] * full + [(0, tail)] * (tail > 0)
            self.length += count
            return replace(before, table=self.layout().table)

    def drop(self, start: int, stop: int) -> None:
        if stop <= start:
            return
        self.version += 1
        kept = spans_without(self.columns, start, stop)
        columns, before = [column for column, _ in kept], len(self.columns)
        self.columns = [span for _, span in kept]
        self.length -= stop - start
        if columns == list(range(before)):
            self._moved()  # slots of theirs
            return
        listed = Counter(columns)
        changes = [(column, listed[column] - 1) for column in range(before) if listed[column] != 1]
        self._retable(
            [[row[column] for column in columns] for row in self.table],
            [([row[column] for row in self.table], change) for column, change in changes],
        )

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; only the last columns are looked at."""
        excess, before = self.length - length, len(self.columns)
        if excess <= 0:
            return
        self.version += 1
        self.length = length
        while excess:
            low, high = self.columns.pop()
            if high - low > excess:
                self.columns.append((low, high - excess))
            excess -= min(high - low, excess)
        kept = len(self.columns)
        if kept < before:
            self._retable([row[:kept] for row in self.table], [(row[kept:], -1) for row in self.table])

    def write(self, start: int, new: Planes) -> None:
        self.version += 1
        stop = start + new[0].shape[2]
        first = 0
        with self.lock:
            for column, (low, high) in enumerate(self.columns):
                last = first + high - low
                head, tail = max(first, start), min(last, stop)
                if head < tail:
                    self._own(column)
                    tokens = [states[:, :, head - start : tail - start] for states in new]
                    self._write([row[column] for row in self.table], low + head - first, tokens)
                first = last

    def select(self, rows: torch.Tensor) -> None:
        self.version += 1
        chosen = rows.tolist()
        self._copies = (1, 0)
        if len(set(chosen)) < len(chosen):
            self.reserved = 0  # rows that share pages need fewer of them, nobody knows how many
        copies = Counter(chosen)
        changes = [(pages, copies[row] - 1) for row, pages in enumerate(self.table) if copies[row] != 1]
        self._retable([list(self.table[row]) for row in chosen], changes)

    def layout(self) -> Layout:
        if self._ids is None:
            self._ids = torch.tensor(self.table, dtype=torch.long).view(len(self.table), len(self.columns))
        return Layout(self.length, table=self._ids, spans=tuple(self.columns))

    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        return self.layout().read(self.planes[which], first, self.length if last is None else last, rows)

    def held_tokens(self) -> int:
        spans = {(page, span) for row in self.table for page, span in zip(row, self.columns, strict=True)}
        return sum(high - low for _, (low, high) in spans)

    def _room(self) -> int:
        return self.page_size - self.columns[-1][1] if self.columns else 0

    def _own(self, column: int) -> None:
        """Gives every row a page of its own in `column`, copying those that are shared."""
        rows = self._rows_to_copy(column)
        if rows:
            fresh = self._copy([self.table[row][column] for row in rows], slice(*self.columns[column]))
            self._give(rows, column, fresh)
            self._moved()

    def _rows_to_copy(self, column: int) -> list[int]:
        """The rows whose page in `column` is to be copied before it is written to."""
        shared = [row for row, pages in enumerate(self.table) if self.blocks.is_shared(pages[column])]
        # Of the rows that share one page the last may keep it.
        owners = {self.table[row][column]: row for row in shared if self._holders_are_here(self.table[row], column)}
        return [row for row in shared if owners.get(self.table[row][column]) != row]

    def _take_copies(self, placing: PageSlots) -> None:
        """Gives rows the copies of their last pages that a placing names; the caller holds the lock."""
        taken = self.blocks.take(len(placing.fresh))
        assert taken == [*placing.fresh], f"{taken} are free, and not {placing.fresh}"
        placing.copy(self.pages.planes)
        self._give(placing.rows, -1, placing.fresh)

    def _give(self, rows: Sequence[int], column: int, pages: Sequence[int]) -> None:
        """Lists other pages for some rows in `column`."""
        self.blocks.release([self.table[row][column] for row in rows])
        for row, page in zip(rows, pages, strict=True):
            self.table[row][column] = page

    def _holders_are_here(self, row: list[int], column: int) -> bool:
        """Whether only `column` of other rows, and this row wherever it lists it, hold the row's page there."""
        page = row[column]
        return self.blocks.refcounts[page] == sum(other[column] == page for other in self.table) + row.count(page) - 1

    def _empty(self) -> PagedStore:
        return PagedStore(self.page_size, bound=self.bound)

    def _begin(self, new: Planes) -> None:
        self.device = new[0].device
        self.table = [[] for _ in range(len(new[0]))]
        self.planes = [self.allocate((0, plane.shape[1], self.page_size, plane.shape[3]), plane) for plane in new]

    def _write(self, pages: list[int], first: int, tokens: Sequence[torch.Tensor]) -> None:
        """Writes tokens `[B, H_i, n, d_i]` from slot `first` of B `pages` on."""
        index = torch.tensor(pages, device=self.device)
        for plane, states in zip(self.planes, tokens, strict=True):
            slots = bits_of(plane).narrow(2, first, states.shape[2])
            slots.index_copy_(0, index, bits_of(states.to(plane.device)))

    def _fill(self, pages: list[int], content: Sequence[torch.Tensor]) -> None:
        """Writes whole pages `[n, H_i, P, d_i]`."""
        for plane, states in zip(self.planes, content, strict=True):
            plane[pages] = states.to(plane.device)

    def _pages_of(self, whole: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Arranges tokens `[B, H_i, columns, P, d_i]` as pages `[columns * B, H_i, P, d_i]`."""
        return [tokens.permute(2, 0, 1, 3, 4).flatten(0, 1) for tokens in whole]

    def _moved(self) -> None:
        self._ids = self._key = None

    def _copy(self, pages: list[int], held: slice) -> list[int]:
        """Copies the slots `held` of `pages`; the copies may be written to."""
        fresh = self._take(len(pages))
        copy_slots(self.planes, held, *torch.tensor((pages, fresh), device=self.device))
        return fresh

    def _retable(self, table: list[list[int]], changes: list[tuple[list[int], int]]) -> None:
        """Takes another table, in which some pages are listed so many times more; -1 for once less."""
        with self.lock:
            for pages, more in changes:
                for _ in range(more):
                    self.blocks.retain(pages)
            for pages, more in changes:
                if more < 0:
                    self.blocks.release(pages)
            self.table = table
            self._moved()
            self._shrink()
