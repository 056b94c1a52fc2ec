"""`OffloadedStore`: pages behind a block table, most of them in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hfkv.layout import Layout
from hfkv.stores.base import PlaneBytes, Planes, Run, storage_bytes, token_bytes
from hfkv.stores.offload import Place
from hfkv.stores.paged import PagedStore
from hfkv.stores.staging import Staging, Wanted
from hfkv.stores.tiers import TieredPages


@dataclass(frozen=True)
class _Piece:
    """Columns of the block table that are read together: where they are, or what to bring.

    Attributes:
        first, last: columns.
        begin: index of their first token among those held.
        table: of pages on the device, int64 `[B, columns]`; None where they are to be brought.
        wanted: what is to be brought.
    """

    first: int
    last: int
    begin: int
    table: torch.Tensor | None
    wanted: Wanted | None


class OffloadedStore(PagedStore):
    """A `PagedStore` whose pages are filled on the device, and stay there or go to host memory, once.

    `runs` brings those that are there through the buffers of a `Staging`, and has the next ones, of the next store
    too, on their way while one is read.

    Args:
        page_size: P, in tokens.
        place: which layer this is of those that share buffers and a budget.
        bound: see `Store`.
    """

    def __init__(self, page_size: int, place: Place, *, bound: int | None = None) -> None:
        super().__init__(page_size, bound=bound)
        self.place = place
        self._pieces: tuple[Any, tuple[int, int], list[_Piece]] | None = None

    @property
    def tiers(self) -> TieredPages:
        """The pages, once there are some."""
        return cast(TieredPages, self.pages)

    @property
    def staging(self) -> Staging:
        """The buffers that its pages pass through."""
        assert self.device is not None
        return self.place.offload.staging(self.device)

    def move(self, place: Place) -> None:
        """Uses the buffers of another cache from here on: this one is a fork's."""
        self.place = place
        if self.planes:
            self._join()

    @property
    def home(self) -> torch.device | None:
        return torch.device("cpu")

    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        last = self.length if last is None else last
        if not self.columns:
            return super().read(which, first, last, rows)
        begins = self.layout().begins
        low, high = (sum(begin <= index for begin in begins) - 1 for index in (first, max(last - 1, first)))
        high += 1
        pages = list(dict.fromkeys(page for row in self.table[rows] for page in row[low:high]))
        places = {page: place for place, page in enumerate(pages)}
        with self.lock:
            content = self.tiers.gather(pages, which)
        table = torch.tensor([[places[page] for page in row[low:high]] for row in self.table[rows]], dtype=torch.long)
        begin, spans = begins[low], tuple(self.columns[low:high])
        return Layout(sum(b - a for a, b in spans), table=table, spans=spans).read(content, first - begin, last - begin)

    def runs(self, last: int, first: int = 0, uncut: int = 0) -> Iterator[Run]:
        pieces = [piece for piece in self._cut(uncut) if piece.begin < last and self._end(piece) > first]
        coming = [piece.wanted for piece in pieces if piece.wanted is not None]
        staging = self.staging
        for piece in pieces:
            spans = tuple(self.columns[piece.first : piece.last])
            length = min(sum(high - low for low, high in spans), last - piece.begin)
            if piece.wanted is None:
                layout = Layout(length, table=piece.table, spans=spans)
                yield Run(tuple(self.planes), layout, piece.begin)
                continue
            buffer = staging.bring(coming.pop(0))
            staging.ahead(self, coming)
            staging.wait(buffer)
            table = [[buffer.places[page] for page in row[piece.first : piece.last]] for row in self.table]
            layout = Layout(length, table=torch.tensor(table, dtype=torch.long), spans=spans)
            try:
                yield Run(tuple(buffer.planes), layout, piece.begin)
            finally:
                staging.release(buffer)
        staging.ahead(self, ())

    def wanted(self) -> list[Wanted]:
        """What `runs` will have to bring, as things stand."""
        return [piece.wanted for piece in self._cut(self.place.uncut) if piece.wanted is not None]

    def memory(self) -> list[PlaneBytes]:
        if not self.planes:
            return []
        found = []
        spans = {page: high - low for row in self.table for page, (low, high) in zip(row, self.columns, strict=True)}
        there = sum(count for page, count in spans.items() if self.tiers.slot(page) >= 0)
        away = sum(spans.values()) - there
        for index, (plane, segments) in enumerate(zip(self.planes, self.tiers.host.planes(), strict=True)):
            each = token_bytes(plane)
            found.append(PlaneBytes(index, plane.device, storage_bytes((plane,)), there * each))
            found.append(PlaneBytes(index, torch.device("cpu"), storage_bytes(segments), away * each))
        return found

    def nbytes(self) -> int:
        return sum(plane.allocated for plane in self.memory())

    def extend(self, count: int) -> Layout:
        with self.lock:
            if count and self._room():
                self._own(-1)
                self.tiers.open([row[-1] for row in self.table])
            return super().extend(count)

    def _empty(self) -> PagedStore:
        return OffloadedStore(self.page_size, self.place, bound=self.bound)

    def _begin(self, new: Planes) -> None:
        self.device = new[0].device
        like = [plane.new_empty(0, plane.shape[1], self.page_size, plane.shape[3]) for plane in new]
        page_bytes = sum(token_bytes(plane) for plane in like) * self.page_size
        most = self.place.share(page_bytes, self.page_size, len(new[0]), self.reserved)
        bus = self.staging.bus
        self.pages.leave(())
        self.pages = TieredPages(bus, most, self.bound is not None, like)
        self.pages.join(())
        self.table = [[] for _ in range(len(new[0]))]
        self._join()

    def _join(self) -> None:
        self.staging.join(self)
        self.tiers.stagings.add(self.staging)

    def _write(self, pages: list[int], first: int, tokens: Sequence[torch.Tensor]) -> None:
        self.tiers.write(pages, first, [states.to(self.device) for states in tokens])

    def _fill(self, pages: list[int], content: Sequence[torch.Tensor]) -> None:
        self.tiers.fill(pages, [states.to(self.device).contiguous() for states in content])

    def _copy(self, pages: list[int]) -> list[int]:
        return self.tiers.copy(pages)

    def _take_columns(self, full: int, has_tail: bool) -> list[list[int]]:
        if self.columns:
            # A window's first page has its sinks, which it holds for good.
            is_first = len(self.columns) == 1 and self.bound is not None
            self.tiers.close(list(dict.fromkeys(row[-1] for row in self.table)), stay=is_first)
        tokens = self.reserved or (self.bound or 0)
        if self.bound is not None:
            tokens = min(tokens, self.bound + self.page_size)
        expected = len(self.table) * -(-tokens // self.page_size)
        return self.tiers.take_columns(len(self.table), full, has_tail, expected)

    def _shrink(self) -> None:
        if self.planes:
            self.tiers.host.trim()

    def _end(self, piece: _Piece) -> int:
        return piece.begin + sum(high - low for low, high in self.columns[piece.first : piece.last])

    def _cut(self, uncut: int) -> list[_Piece]:
        """The columns in pieces: all on the device, or as many of others as go into a buffer."""
        if not self.planes:
            return []
        self.place.uncut = uncut
        table, rest = self.layout().table, (self.tiers.version, uncut)
        if self._pieces is None or self._pieces[0] is not table or self._pieces[1] != rest:
            self._pieces = (table, rest, self._cut_anew(uncut))
        return self._pieces[2]

    def _cut_anew(self, uncut: int) -> list[_Piece]:
        capacity = self.staging.capacity(self.tiers)
        begins = self.layout().begins
        columns = [list(dict.fromkeys(row[c] for row in self.table)) for c in range(len(self.columns))]
        is_here = [self.tiers.is_on_device(column) for column in columns]
        slots = sum(begin < uncut for begin in begins)
        if slots > 1:
            is_here[:slots] = [all(is_here[:slots])] * slots
        pieces: list[_Piece] = []
        first = 0
        pages: list[int] = []
        for c in range(len(columns) + 1):
            ends = c == len(columns) or (c > first and is_here[c] != is_here[first])
            if not ends and not is_here[c] and c >= slots and len(pages) + len(columns[c]) > capacity and c > first:
                ends = True
            if ends and c > first:
                pieces.append(self._piece(first, c, begins[first], pages, is_here[first]))
                first, pages = c, []
            if c < len(columns):
                pages += [page for page in columns[c] if page not in pages] if not is_here[c] else []
        return pieces

    def _piece(self, first: int, last: int, begin: int, pages: list[int], is_here: bool) -> _Piece:
        if not is_here:
            return _Piece(first, last, begin, None, Wanted(self.tiers, tuple(pages)))
        slots = [[self.tiers.slot(page) for page in row[first:last]] for row in self.table]
        return _Piece(first, last, begin, torch.tensor(slots, dtype=torch.long), None)
