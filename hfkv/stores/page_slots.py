"""`PageSlots`: the slots of pages that new tokens are written to, and those that all tokens are read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hfkv.stores.base import Placing, Planes
from hfkv.stores.block_table import BlockTable, LastColumn
from hfkv.stores.blocks import BlockPool
from hfkv.stores.layout import bits_of, is_float8
from hfkv.stores.planes import has_tokens_innermost


class PageSlots(Placing):
    """Places of tokens in pages `[N, H, P, d]`: rows of ``plane.view(N · H · P, d)``, or of ``plane[n, h, p]``.

    Args:
        table: block table of the tokens held before.
        planes: planes of the pages.
        count: number of new tokens, which the last column has room for.
        last: what is to be done to the last column before, for which there are free pages enough.

    Attributes:
        after: the block table afterwards.
    """

    __slots__ = ("_copied", "_counted", "_new", "_of_planes", "_old", "_reads", "after", "copies", "last")

    def __init__(self, table: BlockTable, planes: Sequence[torch.Tensor], count: int, last: LastColumn) -> None:
        low, high = table.columns[-1]
        self.last, self.copies = last, bool(last.rows)
        if last.rows:
            device, new = planes[0].device, torch.tensor(last.fresh)
            old = torch.tensor([table.rows[row][-1] for row in last.rows])
            self._old, self._copied = old.tolist(), (slice(low, high), old.to(device), new.to(device))
            table = table.giving(last.rows, -1, last.fresh)
        before = table.layout
        assert before.table is not None
        self.start, self.before, self.after = 0, before, table.extended(count, (), ())
        self._counted: tuple[BlockPool, BlockPool] | None = None
        # Heads, width, whether tokens are innermost, and whether the dtype is one that torch cannot index.
        self._of_planes = [
            (plane.shape[1], plane.shape[3], has_tokens_innermost(plane), is_float8(plane.dtype)) for plane in planes
        ]
        pages, slots = before.table[:, -1:], torch.arange(high, high + count)
        self._new: Any = {
            (heads, is_turned): _rows(pages, slots, heads, is_turned, planes[0])
            for heads, _, is_turned, _ in self._of_planes
        }
        self._reads: dict[tuple[int, bool, int, int], Any] = {}

    def counted(self, blocks: BlockPool) -> BlockPool:
        """The counts of pages once rows have their copies; for the same counts the same ones again."""
        if self._counted is None or blocks != self._counted[0]:
            after = blocks.copy()
            taken = after.take(len(self.last.fresh))
            assert taken == [*self.last.fresh], f"{taken} are free, and not {self.last.fresh}"
            after.release(self._old)
            self._counted = blocks, after
        return self._counted[1]

    def write(self, planes: Sequence[torch.Tensor], new: Planes) -> None:
        """Writes new tokens `[B, H_i, count, d_i]`, if any are given."""
        for plane, tokens, (heads, width, is_turned, is_bits) in zip(planes, new, self._of_planes, strict=False):
            if is_bits:
                plane, tokens = plane.view(torch.uint8), tokens.view(torch.uint8)
            if is_turned:
                plane.index_put_(self._new[heads, True], tokens.reshape(-1, width))
            elif width:
                plane.view(-1, width).index_copy_(0, self._new[heads, False], tokens.reshape(-1, width))

    def copy(self, planes: Sequence[torch.Tensor]) -> None:
        """Copies the last pages of the rows that share theirs."""
        copy_slots(planes, *self._copied)

    def read(self, planes: Sequence[torch.Tensor], first: int, last: int) -> Planes:
        """Reads tokens `first .. last - 1`, `[B, H_i, last - first, d_i]`."""
        found = []
        for plane, (heads, width, is_turned, is_bits) in zip(planes, self._of_planes, strict=True):
            shape = len(self.after.rows), heads, last - first, width
            if not width:
                found.append(plane.new_empty(shape))
                continue
            key = heads, is_turned, first, last
            index = self._reads.get(key)
            if index is None:
                index = self._reads[key] = self._index(plane, *key)
            bits = plane.view(torch.uint8) if is_bits else plane
            rows = bits[index].contiguous() if is_turned else bits.view(-1, width).index_select(0, index)
            found.append((rows.view(plane.dtype) if is_bits else rows).view(shape))
        return tuple(found)

    def _index(self, plane: torch.Tensor, heads: int, is_turned: bool, first: int, last: int) -> Any:
        spans, table = self.after.columns, self.before.table
        assert table is not None
        counts = torch.tensor([high - low for low, high in spans])
        columns = torch.repeat_interleave(torch.arange(len(spans)), counts)[first:last]
        slots = torch.cat([torch.arange(low, high) for low, high in spans])[first:last]
        return _rows(table[:, columns], slots, heads, is_turned, plane)


def copy_slots(planes: Sequence[torch.Tensor], held: slice, old: torch.Tensor, new: torch.Tensor) -> None:
    """Copies the slots `held` of the pages `old` to those of the pages `new`, int64 `[n]` each."""
    for plane in planes:
        slots = bits_of(plane).narrow(2, held.start, held.stop - held.start)
        slots.index_copy_(0, new, slots.index_select(0, old))


def _rows(pages: torch.Tensor, slots: torch.Tensor, heads: int, is_turned: bool, plane: torch.Tensor) -> Any:
    """Rows of slots `[T]` of pages `[B, 1 or T]`, for all heads: int64 `[B · H · T]`, or a tuple of three if turned."""
    of_heads = pages[:, None] * heads + torch.arange(heads)[:, None]
    rows = (of_heads * plane.shape[2] + slots).flatten().to(plane.device)
    if not is_turned:
        return rows
    return rows // (heads * plane.shape[2]), rows // plane.shape[2] % heads, rows % plane.shape[2]
