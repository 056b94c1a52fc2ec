"""`OffloadedStore`: pages behind a block table, most of them in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hfkv.measure.allocated import storage_bytes
from hfkv.stores.base import PlaneBytes, Planes, Run
from hfkv.stores.block_table import BlockTable
from hfkv.stores.layout import Layout
from hfkv.stores.offload.budget import Place
from hfkv.stores.offload.staging import Staging, Wanted
from hfkv.stores.offload.tiers import TieredPages
from hfkv.stores.paged import PagedStore
from hfkv.stores.planes import token_bytes


@dataclass(frozen=True, eq=False)
class _Piece:
    """Columns of the block table that are read together.

    Attributes:
        rows: each row's pages in these columns of the table.
        begin, end: index of the first token among the tokens held, and index behind the last token; `end` is None for
            the last piece, which grows.
        spans: spans of the columns; for the last piece, the spans when it was cut.
        first: index of the first column.
        wanted: pages to bring; None where all are on the device.
        table: places of the pages on the device, or in a buffer that has nothing else: int64 `[B, columns]`.
    """

    rows: list[list[int]]
    begin: int
    end: int | None
    spans: tuple[tuple[int, int], ...]
    first: int
    wanted: Wanted | None
    table: torch.Tensor


class OffloadedStore(PagedStore):
    """`PagedStore` with pages that are filled on the device, and stay there or go to host memory once.

    `runs` brings pages from host memory through the buffers of a `Staging`; while it reads one, the next are on their
    way, the next store's too.

    Args:
        page_size: number of tokens a page, P.
        place: place of the layer among the layers that share buffers and a budget.
        bound, tokens_innermost: see `Store`.
    """

    is_offloaded = True

    def __init__(
        self, page_size: int, place: Place, *, bound: int | None = None, tokens_innermost: tuple[int, ...] = ()
    ) -> None:
        super().__init__(page_size, bound=bound, tokens_innermost=tokens_innermost)
        self.place = place
        self._asked = place.budget.asked
        self._pieces: tuple[Any, tuple[int, int], list[_Piece]] | None = None

    @property
    def tiers(self) -> TieredPages:
        """The pages on the device and in host memory, once there are some."""
        return cast(TieredPages, self.pages)

    @property
    def staging(self) -> Staging:
        """The staging buffers that the pages pass through."""
        assert self.device is not None
        return self.place.offload.staging(self.device)

    def move(self, place: Place) -> None:
        """Switches to the buffers of another cache, a fork."""
        self.place, self._asked = place, place.budget.asked
        if self.planes:
            self._join()

    @property
    def home(self) -> torch.device | None:
        return torch.device("cpu")

    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        last = self.length if last is None else last
        if not self.columns or not self.table:
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
            length = min(self._end(piece), last) - piece.begin
            spans = piece.spans if piece.end is not None else tuple(self.columns[piece.first :])
            if piece.wanted is None:
                staging.ahead(self, coming)
                yield Run(tuple(self.planes), Layout(length, table=piece.table, spans=spans), piece.begin)
                continue
            buffer = staging.bring(coming.pop(0))
            try:
                staging.ahead(self, coming)
                staging.wait(buffer)
                table = piece.table
                if buffer.holds is not piece.wanted:
                    table = _table([[buffer.places[page] for page in row] for row in piece.rows])
                yield Run(tuple(buffer.planes), Layout(length, table=table, spans=spans), piece.begin)
            finally:
                staging.release(buffer)
        staging.ahead(self, ())

    def wanted(self) -> list[Wanted]:
        """The pages that `runs` will have to bring, as things stand."""
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
                self.tiers.open(self.table, [row[-1] for row in self.table])
            return super().extend(count)

    def _empty(self) -> PagedStore:
        return OffloadedStore(self.page_size, self.place, bound=self.bound, tokens_innermost=self.tokens_innermost)

    def _begin(self, new: Planes) -> None:
        self.device = new[0].device
        self._hold(BlockTable([[] for _ in range(len(new[0]))]))
        like = self.blanks(new, 0, self.page_size)
        most = self._share(like)
        bus = self.staging.bus
        self.pages = TieredPages(bus, most, self.bound is not None, like)
        self.pages.stores = 1
        self._join()

    def _share(self, like: Sequence[torch.Tensor] | None = None) -> int | None:
        """The number of pages that may stay on the device; asked for again when the cache is to hold more."""
        self._asked = self.place.budget.asked
        page_bytes = self.page_size * sum(map(token_bytes, like or self.planes))
        return self.place.budget.share(self.place.index, page_bytes, self.page_size, len(self.table), self.reserved)

    def _join(self) -> None:
        self.staging.join(self)
        with self.lock:
            self.tiers.stagings.add(self.staging)

    def _write(self, pages: list[int], first: int, tokens: Sequence[torch.Tensor]) -> None:
        self.tiers.write(pages, first, [states.to(self.device) for states in tokens])

    def _pages_of(self, whole: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Copies: the caller may write to the tokens before they have been sent.
        content = []
        for tokens, plane in zip(whole, self.planes, strict=False):
            columns, rows, heads = tokens.shape[2], tokens.shape[0], tokens.shape[1]
            pages = self.allocate((columns * rows, heads, *tokens.shape[3:]), like=plane)
            pages.unflatten(0, (columns, rows)).copy_(tokens.permute(2, 0, 1, 3, 4))
            content.append(pages)
        return content

    def _fill(self, pages: list[int], content: Sequence[torch.Tensor]) -> None:
        self.tiers.fill(pages, content)

    def _copy(self, pages: list[int], held: slice) -> list[int]:
        return self.tiers.copy(self.table, pages)

    def _take_columns(self, full: int, has_tail: bool) -> list[list[int]]:
        if self.columns:
            # A window's first page has its sinks, which it holds for good.
            is_first = len(self.columns) == 1 and self.bound is not None
            self.tiers.close(self.table, list(dict.fromkeys(row[-1] for row in self.table)), stay=is_first)
        if 0 < self.reserved <= self.length:
            self.reserved = 0  # the text goes on beyond what was reserved: nobody knows how far
            self.place.budget.divide_anew()
        tokens = self.reserved or (self.bound or 0)
        if self.bound is not None:
            tokens = min(tokens, self.bound + self.page_size)
        expected = len(self.table) * -(-tokens // self.page_size)
        if self._asked is not self.place.budget.asked:
            self.tiers.most = self._share()
        fresh = self.tiers.take_columns(self.table, full, has_tail, expected)
        try:
            # The buffer that brings pages back must be there before anything is sent away.
            columns = [*self.table[0], *fresh[0]] if self.table else []
            away = sum(self.tiers.slot(page) < 0 for page in columns)
            self.staging.expect(self.tiers, away * len(self.table))
        except BaseException:
            self.blocks.release([page for row in fresh for page in row])
            raise
        return fresh

    def _shrunk(self, table: BlockTable) -> BlockTable:
        if self.planes:
            self.tiers.shrink(len(table.rows) if self.bound is not None else None)
        return table

    def _alike(self, asked: tuple[Any, ...], work: Callable[[BlockTable], BlockTable]) -> BlockTable:
        with self.lock:
            self._counts = self.blocks
            return work(self.block_table)  # each layer's pages lie elsewhere

    def _end(self, piece: _Piece) -> int:
        return self.length if piece.end is None else piece.end

    def _cut(self, uncut: int) -> list[_Piece]:
        """Cuts the columns into pieces: all on the device, or as many others as go into a buffer."""
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
        listed: set[int] = set()
        for c in range(len(columns) + 1):
            ends = c == len(columns) or (c > first and is_here[c] != is_here[first])
            if not ends and not is_here[c] and c >= slots and len(pages) + len(columns[c]) > capacity and c > first:
                ends = True
            if ends and c > first:
                pieces.append(self._piece(first, c, begins, pages, is_here[first]))
                first, pages, listed = c, [], set()
            if c < len(columns):
                pages += [] if is_here[c] else [page for page in columns[c] if page not in listed]
                listed.update(columns[c])
        return pieces

    def _piece(self, first: int, last: int, begins: Sequence[int], pages: list[int], is_here: bool) -> _Piece:
        rows = [row[first:last] for row in self.table]
        wanted = None if is_here else Wanted(self.tiers, tuple(pages))
        where = self.tiers.slot if wanted is None else wanted.places.__getitem__
        end = begins[last] if last < len(begins) else None
        spans = tuple(self.columns[first:last])
        return _Piece(rows, begins[first], end, spans, first, wanted, _table([[where(p) for p in row] for row in rows]))


def _table(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long)
