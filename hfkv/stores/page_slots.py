"""`PageSlots`: the slots of pages that new tokens are written to, and those that all tokens are read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hfkv.stores.base import Placing, Planes
from hfkv.stores.layout import Layout, bits_of, is_float8


class PageSlots(Placing):
    """Places of tokens in pages `[N, H, P, d]`, as rows of ``plane.view(N · H · P, d)``.

    Args:
        before: layout of the tokens held before.
        planes: planes of the pages.
        count: number of new tokens, which the last column has room for.
        key: the block table and the full columns, to compare.
        rows, fresh: rows whose last page others list too, and the pages that copies of these are made in.

    Attributes:
        length, column: the store's length and last column afterwards.
        table: the block table, int64 `[B, columns]`.
    """

    __slots__ = (
        "_copied",
        "_new",
        "_of_planes",
        "_reads",
        "column",
        "fresh",
        "key",
        "length",
        "rows",
        "spans",
        "table",
    )

    def __init__(
        self,
        before: Layout,
        planes: Sequence[torch.Tensor],
        count: int,
        key: Any,
        rows: Sequence[int] = (),
        fresh: Sequence[int] = (),
    ) -> None:
        assert before.table is not None
        low, high = before.spans[-1]
        self.rows, self.fresh, table = rows, fresh, before.table
        if fresh:
            table = before.table.clone()
            new = torch.tensor(fresh)
            self._copied = slice(low, high), table[list(rows), -1].to(planes[0].device), new.to(planes[0].device)
            table[list(rows), -1] = new
            before = replace(before, table=table)
            key = tuple(map(tuple, table.tolist())), key[1]
        self.start, self.key, self.before = 0, key, before
        self.table, self.length, self.column = table, before.length + count, (low, high + count)
        self.spans = (*before.spans[:-1], self.column)
        # Heads, width, and whether the dtype is one that torch cannot index.
        self._of_planes = [(plane.shape[1], plane.shape[3], is_float8(plane.dtype)) for plane in planes]
        pages, slots = self.table[:, -1:], torch.arange(high, high + count)
        self._new = {heads: _rows(pages, slots, heads, planes[0]) for heads, _, _ in self._of_planes}
        self._reads: dict[tuple[int, int, int], torch.Tensor] = {}

    def write(self, planes: Sequence[torch.Tensor], new: Planes) -> None:
        """Writes new tokens `[B, H_i, count, d_i]`, if any are given."""
        for plane, tokens, (heads, width, is_bits) in zip(planes, new, self._of_planes, strict=False):
            if is_bits:
                plane, tokens = plane.view(torch.uint8), tokens.view(torch.uint8)
            if width:
                plane.view(-1, width).index_copy_(0, self._new[heads], tokens.reshape(-1, width))

    def copy(self, planes: Sequence[torch.Tensor]) -> None:
        """Copies the last pages of `rows` to those of `fresh`."""
        copy_slots(planes, *self._copied)

    def read(self, planes: Sequence[torch.Tensor], first: int, last: int) -> Planes:
        """Reads tokens `first .. last - 1`, `[B, H_i, last - first, d_i]`."""
        found = []
        for plane, (heads, width, is_bits) in zip(planes, self._of_planes, strict=True):
            shape = len(self.table), heads, last - first, width
            if not width:
                found.append(plane.new_empty(shape))
                continue
            key = heads, first, last
            index = self._reads.get(key)
            if index is None:
                index = self._reads[key] = self._index(plane, *key)
            rows = (plane.view(torch.uint8) if is_bits else plane).view(-1, width).index_select(0, index)
            found.append((rows.view(plane.dtype) if is_bits else rows).view(shape))
        return tuple(found)

    def _index(self, plane: torch.Tensor, heads: int, first: int, last: int) -> torch.Tensor:
        counts = torch.tensor([high - low for low, high in self.spans])
        columns = torch.repeat_interleave(torch.arange(len(self.spans)), counts)[first:last]
        slots = torch.cat([torch.arange(low, high) for low, high in self.spans])[first:last]
        return _rows(self.table[:, columns], slots, heads, plane)


def copy_slots(planes: Sequence[torch.Tensor], held: slice, old: torch.Tensor, new: torch.Tensor) -> None:
    """Copies the slots `held` of the pages `old` to those of the pages `new`, int64 `[n]` each."""
    for plane in planes:
        slots = bits_of(plane).narrow(2, held.start, held.stop - held.start)
        slots.index_copy_(0, new, slots.index_select(0, old))


def _rows(pages: torch.Tensor, slots: torch.Tensor, heads: int, plane: torch.Tensor) -> torch.Tensor:
    """Rows of slots `[T]` of pages `[B, 1 or T]`, for all heads: int64 `[B · H · T]`."""
    of_heads = pages[:, None] * heads + torch.arange(heads)[:, None]
    return (of_heads * plane.shape[2] + slots).flatten().to(plane.device)
