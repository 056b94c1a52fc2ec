"""`PagedStore`: pages of tokens behind a block table, shared by reference and copied on write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hfkv.stores.base import Placing, Planes
from hfkv.stores.block_table import BlockTable, LastColumn
from hfkv.stores.layout import Layout, bits_of
from hfkv.stores.page_room import PageRoom
from hfkv.stores.page_slots import PageSlots, copy_slots


class PagedStore(PageRoom):
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, and for each row a list of pages: its block table.

    All rows hold tokens of the same positions, so one list of columns `[low, high)` says which tokens of a page
    are held, for every row. Copies of rows (beams) and of the whole store (`fork`) share pages; a shared page that is
    written to is copied first. Dropping frees whole pages; a page cut in two by a drop is listed twice.

    What happens to the table and to the counts of pages is worked out by the first layer of a group, and all have the
    same table; see `PageRoom._alike`.

    Args:
        page_size: number of tokens a page, P.
    """

    is_paged = True

    def __del__(self) -> None:
        if "changes" in vars(self):  # else it was never made whole
            self.pages.leave(self.block_table)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pages.join(self.block_table)

    def __deepcopy__(self, memo: Any) -> PagedStore:
        return self.fork(torch.arange(len(self.block_table.rows)))

    def fork(self, rows: torch.Tensor) -> PagedStore:
        forked = self._empty()
        chosen = rows.tolist()

        def work(table: BlockTable) -> BlockTable:
            copy, _ = table.chosen(chosen)
            self._counts.retain(copy.pages)
            return copy

        with self.lock:
            copy = self._alike(("fork", *chosen), work)
            forked.pages = self.pages
            forked.pages.stores += 1
            forked._hold(copy)
            forked.device = self.device
        return forked

    def expect_copies(self, copies: int, tokens: int) -> None:
        self._copies = (copies, tokens)

    def append(self, new: Planes) -> None:
        with self.lock:
            if not self.planes:
                self._begin(new)
            table = self.block_table
            count, first, last = new[0].shape[2], len(table.columns), self.length
            slot = table.columns[-1][1] if table.columns else self.page_size
            head = min(count, self.page_size - slot)
            full, tail = divmod(count - head, self.page_size)
            # What may find no memory comes first: then nothing has changed.
            end = head + full * self.page_size
            whole = [tokens[:, :, head:end].unflatten(2, (full, self.page_size)) for tokens in new] if full else []
            content = self._pages_of(whole)
            self.extend(count)
            rows = self.block_table.rows
            try:
                if head:
                    self._write([row[first - 1] for row in rows], slot, [tokens[:, :, :head] for tokens in new])
                if full:
                    pages = [row[column] for column in range(first, first + full) for row in rows]
                    self._fill(pages, content)
                if tail:
                    self._write([row[-1] for row in rows], 0, [tokens[:, :, count - tail :] for tokens in new])
            except BaseException:
                self.truncate(last)
                raise

    @property
    def extent(self) -> object:
        table = self.block_table
        if not table.columns or self.is_offloaded:
            return None
        # Pages that are copied before they are written to, and those that the copies are made in.
        return table, self._last_column

    @property
    def has_shared_end(self) -> bool:
        table = self.block_table
        return bool(table.columns) and self.pages.blocks.is_any_shared([row[-1] for row in table.rows])

    @property
    def _last_column(self) -> LastColumn:
        return self.block_table.last_column(self.pages.blocks)

    def placing(self, count: int, start: int, stop: int) -> Placing | None:
        if self.extent is None or stop > start or count > self._room():
            return None  # columns begin or go
        last = self._last_column
        if len(last.fresh) < len(last.rows):
            return None  # planes have to grow
        return PageSlots(self.block_table, self.planes, count, last)

    def put(self, placing: Placing, new: Planes | None) -> None:
        assert isinstance(placing, PageSlots)
        with self.pages.lock:
            if placing.copies:
                self.pages.blocks = placing.counted(self.pages.blocks)
                placing.copy(self.pages.planes)
            placing.write(self.pages.planes, new or ())
        self._hold(placing.after)

    def read_placed(self, placing: Placing, first: int, last: int) -> Planes:
        assert isinstance(placing, PageSlots)
        return placing.read(self.pages.planes, first, last)

    def is_used_elsewhere(self) -> Callable[[], bool]:
        return self.pages.are_used

    def extend(self, count: int) -> Layout:
        before = self.layout()
        self._hold(self._alike(("extend", count), lambda table: self._extended(table, count)))
        return replace(before, table=self.layout().table)

    def _extended(self, table: BlockTable, count: int) -> BlockTable:
        head = min(count, self._room())
        full, tail = divmod(count - head, self.page_size)
        # What may find no memory comes first: then nothing has changed.
        if head:
            table = self._owning(table, -1)
        fresh = self._take_columns(full, tail > 0) if full or tail else []
        return table.extended(head, fresh, [(0, self.page_size)] * full + [(0, tail)] * (tail > 0))

    def drop(self, start: int, stop: int) -> None:
        if stop > start:
            self.version += 1
            self._hold(self._alike(("drop", start, stop), lambda table: self._retabled(table.without(start, stop))))

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; only the last columns are looked at."""
        if length < self.length:
            self.version += 1
            self._hold(self._alike(("truncate", length), lambda table: self._retabled(table.truncated(length))))

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
                    self._write([row[column] for row in self.block_table.rows], low + head - first, tokens)
                first = last

    def select(self, rows: torch.Tensor) -> None:
        self.version += 1
        chosen = rows.tolist()
        self._copies = (1, 0)
        if len(set(chosen)) < len(chosen):
            self.reserved = 0  # rows that share pages need fewer of them, nobody knows how many
        self._hold(self._alike(("select", *chosen), lambda table: self._retabled(table.chosen(chosen))))

    def layout(self) -> Layout:
        return self.block_table.layout

    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        return self.layout().read(self.planes[which], first, self.length if last is None else last, rows)

    def held_tokens(self) -> int:
        table = self.block_table
        spans = {(page, span) for row in table.rows for page, span in zip(row, table.columns, strict=True)}
        return sum(high - low for _, (low, high) in spans)

    def _room(self) -> int:
        columns = self.block_table.columns
        return self.page_size - columns[-1][1] if columns else 0

    def _own(self, column: int) -> None:
        """Gives every row a page of its own in `column`, copying those that are shared."""
        if self.blocks.is_any_shared([row[column] for row in self.block_table.rows]):
            self._hold(self._alike(("own", column), lambda table: self._owning(table, column)))

    def _owning(self, table: BlockTable, column: int) -> BlockTable:
        rows = table.rows_to_copy(column, self._counts)
        if not rows:
            return table
        old = [table.rows[row][column] for row in rows]
        fresh = self._copy(old, slice(*table.columns[column]))
        self._counts.release(old)
        return table.giving(rows, column, fresh)

    def _empty(self) -> PagedStore:
        order = self.tokens_innermost
        return PagedStore(self.page_size, bound=self.bound, tokens_innermost=order, changes=self.changes)

    def _begin(self, new: Planes) -> None:
        self.device = new[0].device
        self._hold(BlockTable([[] for _ in range(len(new[0]))]))
        self.planes = self.blanks(new, 0, self.page_size)

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

    def _copy(self, pages: list[int], held: slice) -> list[int]:
        """Copies the slots `held` of `pages`; the copies may be written to."""
        fresh = self._take(len(pages))
        self._move(_copy_pages, held, *torch.tensor((pages, fresh), device=self.device))
        return fresh


def _copy_pages(store: PagedStore, held: slice, old: torch.Tensor, new: torch.Tensor) -> None:
    copy_slots(store.planes, held, old.to(store.device), new.to(store.device))
