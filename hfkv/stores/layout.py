"""`Layout`: the places of each row's held tokens in a layer's planes."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hfkv.stores.planes import by_token, has_tokens_innermost


@dataclass(frozen=True, eq=False)
class Layout:
    """The places of the held tokens in planes.

    In contiguous planes `[B, H, C, d]`, token i of row b is ``plane[b, :, start + i]``. In paged planes `[N, H, P, d]`,
    for which `table` is given, tokens lie column by column: the slots ``low <= p < high`` of ``plane[table[b, c]]``
    for ``(low, high) = spans[c]`` hold the next ``high - low`` tokens of row b.

    Attributes:
        length: number of tokens held, the same in every row.
        start: number of slots before the first token; contiguous planes only.
        table: the block table, int64 `[B, columns]` on the CPU; None for contiguous planes.
        spans: range of slots held in each column's page.
    """

    length: int
    start: int = 0
    table: torch.Tensor | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def is_paged(self) -> bool:
        return self.table is not None

    @property
    def end(self) -> Layout:
        """The last column that holds tokens, and those behind it: all that there is to know where tokens are added."""
        if self.table is None or len(self.spans) < 2:
            return self
        return Layout(self.length, table=self.table[:, len(self.spans) - 1 :], spans=self.spans[-1:])

    @functools.cached_property
    def begins(self) -> tuple[int, ...]:
        """The held index of each column's first token."""
        begins, count = [], 0
        for low, high in self.spans:
            begins.append(count)
            count += high - low
        return tuple(begins)

    def read(
        self, planes: Iterable[torch.Tensor], begin: int, end: int, rows: slice = slice(None)
    ) -> tuple[torch.Tensor, ...]:
        """Reads the tokens `begin .. end - 1` of `rows`, `[rows, H, end - begin, d]`, the numbers of each side by side.

        They are slices; copies where they lie in pages, or tokens innermost.
        """
        if self.table is None:
            held = slice(self.start + begin, self.start + end)
            return tuple(by_token(plane[rows, :, held]) for plane in planes)
        first, last = (bisect.bisect_right(self.begins, index) - 1 for index in (begin, end - 1))
        first, last = max(first, 0), max(last, -1)
        table, spans = self.table[rows, first : last + 1], self.spans[first : last + 1]
        skipped = begin - self.begins[first] if spans else 0
        return tuple(_take(plane, table, spans, skipped, end - begin) for plane in planes)


def spans_without(spans: Iterable[tuple[int, int]], start: int, stop: int) -> list[tuple[int, tuple[int, int]]]:
    """What stays of columns without the held tokens `start .. stop - 1`: the index of each column, and its slots."""
    kept = []
    first = 0
    for column, (low, high) in enumerate(spans):
        last = first + high - low
        if first < start:
            kept.append((column, (low, low + min(last, start) - first)))
        if last > stop:
            kept.append((column, (high - (last - max(first, stop)), high)))
        first = last
    return kept


def _take(
    plane: torch.Tensor, table: torch.Tensor, spans: tuple[tuple[int, int], ...], skipped: int, count: int
) -> torch.Tensor:
    """Takes `count` tokens of the columns of `table` `[rows, columns]`, without the first `skipped`."""
    heads, page_size, width = plane.shape[1:]
    # A page of one head is contiguous: taken whole, it is copied at the speed of memory.
    index = (table[:, None] * heads + torch.arange(heads)[:, None]).flatten()  # [rows * H * columns]
    bits, is_turned = bits_of(plane), has_tokens_innermost(plane)
    pages = bits.transpose(2, 3) if is_turned else bits
    pages = pages.view(plane.shape[0] * heads, page_size * width).index_select(0, index.to(plane.device))
    if is_turned:
        pages = pages.view(len(index), width, page_size).transpose(1, 2).contiguous()
    pages = pages.view(len(table), heads, len(spans) * page_size, width)
    if all(high == page_size for _, high in spans[:-1]) and all(low == 0 for low, _ in spans[1:]):
        first = skipped + (spans[0][0] if spans else 0)
        return pages[:, :, first : first + count].view(plane.dtype)
    held = torch.cat([torch.arange(low, high) + page_size * i for i, (low, high) in enumerate(spans)])
    return pages.index_select(2, held[skipped : skipped + count].to(plane.device)).view(plane.dtype)


def is_float8(dtype: torch.dtype) -> bool:
    """Whether torch cannot index tensors of a dtype."""
    return dtype.is_floating_point and dtype.itemsize == 1


def bits_of(plane: torch.Tensor) -> torch.Tensor:
    """A plane that torch can index: 8-bit floats as bytes, since it cannot index them; any other unchanged."""
    return plane.view(torch.uint8) if plane.element_size() == 1 else plane
