"""`BlockTable`: the pages that rows list, and the slots of them that hold tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from hfkv.stores.blocks import BlockPool
from hfkv.stores.layout import Layout, spans_without

# Pages, and how many times more they are listed than before: -1 for once less.
Listed = list[tuple[Sequence[int], int]]


class LastColumn(NamedTuple):
    """What is to be done before tokens are added to the last column of a table.

    Attributes:
        rows: rows that take a copy of their page first.
        fresh: the free pages that the copies are made in; fewer than rows where planes have to grow.
    """

    rows: tuple[int, ...]
    fresh: tuple[int, ...]


class BlockTable:
    """A block table, which never changes: what changes is another one, so that all layers of a group hold the same.

    All rows hold tokens of the same positions, so one list of columns says which tokens of a page are held.

    Args:
        rows: by row, the pages that it lists, one a column.
        columns: the slots ``low <= p < high`` of each column's pages that hold tokens.
        length: number of tokens held.
        layout: the same as a `Layout`, if there is one already.
    """

    __slots__ = ("_last", "_layout", "columns", "length", "rows")

    def __init__(
        self,
        rows: Sequence[list[int]] = (),
        columns: tuple[tuple[int, int], ...] = (),
        length: int = 0,
        layout: Layout | None = None,
    ) -> None:
        self.rows, self.columns, self.length, self._layout = rows, columns, length, layout
        self._last: tuple[BlockPool, LastColumn] | None = None

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, BlockTable):
            return self is other
        return (self.length, self.columns, self.rows) == (other.length, other.columns, other.rows)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return BlockTable, (self.rows, self.columns, self.length)

    @property
    def layout(self) -> Layout:
        """The places of the tokens."""
        if self._layout is None:
            ids = torch.tensor(self.rows, dtype=torch.long).view(len(self.rows), len(self.columns))
            self._layout = Layout(self.length, table=ids, spans=self.columns)
        return self._layout

    @property
    def listed(self) -> set[int]:
        """All pages."""
        return {page for row in self.rows for page in row}

    @property
    def pages(self) -> list[int]:
        """All pages, as often as they are listed."""
        return [page for row in self.rows for page in row]

    def last_column(self, blocks: BlockPool) -> LastColumn:
        """What adding to the last column takes, with pages counted by `blocks`."""
        known = self._last
        if known is None or known[0] is not blocks:
            rows = self.rows_to_copy(-1, blocks)
            fresh = blocks.free[: -len(rows) - 1 : -1] if rows else []
            known = self._last = blocks, LastColumn(tuple(rows), tuple(fresh))
        return known[1]

    def rows_to_copy(self, column: int, blocks: BlockPool) -> list[int]:
        """The rows whose page in `column` is to be copied before it is written to."""
        shared = [row for row, pages in enumerate(self.rows) if blocks.is_shared(pages[column])]
        # Of the rows that share one page the last may keep it.
        owners = {self.rows[row][column]: row for row in shared if self._holds_all(row, column, blocks)}
        return [row for row in shared if owners.get(self.rows[row][column]) != row]

    def _holds_all(self, row: int, column: int, blocks: BlockPool) -> bool:
        """Whether only `column` of other rows, and a row wherever it lists it, hold the row's page there."""
        pages = self.rows[row]
        page = pages[column]
        return blocks.refcounts[page] == sum(other[column] == page for other in self.rows) + pages.count(page) - 1

    def giving(self, rows: Iterable[int], column: int, pages: Iterable[int]) -> BlockTable:
        """The table in which some rows list other pages in `column`."""
        changed = list(self.rows)
        for row, page in zip(rows, pages, strict=True):
            changed[row] = list(changed[row])
            changed[row][column] = page
        return BlockTable(changed, self.columns, self.length)

    def extended(self, head: int, fresh: Sequence[list[int]], columns: Iterable[tuple[int, int]]) -> BlockTable:
        """The table with `head` more tokens in the last column, and each row's `fresh` pages behind it.

        Args:
            head: number of tokens that the last column has room for.
            fresh: new pages of each row; empty where there are none.
            columns: the slots of theirs that hold tokens.
        """
        spans = list(self.columns)
        if head:
            spans[-1] = (spans[-1][0], spans[-1][1] + head)
        more = tuple(columns)
        length = self.length + head + sum(high - low for low, high in more)
        rows = [row + new for row, new in zip(self.rows, fresh, strict=True)] if fresh else self.rows
        layout = None
        if not fresh and self._layout is not None:  # the same pages
            layout = Layout(length, table=self._layout.table, spans=(*spans, *more))
        return BlockTable(rows, (*spans, *more), length, layout)

    def without(self, start: int, stop: int) -> tuple[BlockTable, Listed]:
        """The table without the held tokens ``start <= i < stop``; a page cut in two is listed twice."""
        kept = spans_without(self.columns, start, stop)
        columns, before = [column for column, _ in kept], len(self.columns)
        spans, length = tuple([span for _, span in kept]), self.length - (stop - start)
        if columns == list(range(before)):
            return BlockTable(self.rows, spans, length), []
        listed = Counter(columns)
        changes = [(column, listed[column] - 1) for column in range(before) if listed[column] != 1]
        rows = [[row[column] for column in columns] for row in self.rows]
        return BlockTable(rows, spans, length), [([row[column] for row in self.rows], n) for column, n in changes]

    def truncated(self, length: int) -> tuple[BlockTable, Listed]:
        """The table of the first `length` tokens, fewer than now; only the last columns are looked at."""
        excess, columns = self.length - length, list(self.columns)
        while excess:
            low, high = columns.pop()
            if high - low > excess:
                columns.append((low, high - excess))
            excess -= min(high - low, excess)
        kept = len(columns)
        if kept == len(self.columns):
            return BlockTable(self.rows, tuple(columns), length), []
        gone: Listed = [(row[kept:], -1) for row in self.rows]
        return BlockTable([row[:kept] for row in self.rows], tuple(columns), length), gone

    def chosen(self, rows: Sequence[int]) -> tuple[BlockTable, Listed]:
        """The table whose row i is row `rows[i]` of this one."""
        copies = Counter(rows)
        changes: Listed = [(pages, copies[row] - 1) for row, pages in enumerate(self.rows) if copies[row] != 1]
        return BlockTable([self.rows[row] for row in rows], self.columns, self.length), changes

    def renumbered(self, place: dict[int, int]) -> BlockTable:
        """The table of pages that have moved."""
        return BlockTable([[place[page] for page in row] for row in self.rows], self.columns, self.length)
