"""`ContiguousStore`: one growing buffer a plane, appended in place."""

from __future__ import annotations

import contextlib

import torch

from hfkv.stores.base import GROWTH, Placing, Planes, Store
from hfkv.stores.layout import Layout, bits_of, is_float8
from hfkv.stores.planes import ALIGNED_TOKENS, by_token

# Spare tokens behind a window, which set how often its tokens move back to the buffer's start. 256 tokens are
# 1/16 of the bytes that attention over 4,096 tokens reads anyway.
WINDOW_SLACK = 256
# Of a small window the bytes matter little, and moving it takes as many operations as that of a large one.
LEAST_SLACK = 16


# From so many tokens on, a copy to a slice is as fast as one by indices.
_FEW = 4


class _Slots(Placing):
    """The slots of a `ContiguousStore` that new tokens are written to, and the sinks that move before.

    Attributes:
        length: the store's afterwards, as `start` is.
        begin, count: the slots written to.
        index: the same as int64 `[count]`; None where a slice is written to.
        front, gap: see `Placing`; `gap` tokens go, if any do.
        has_float8: whether a plane is of a dtype that torch cannot index.
    """

    __slots__ = ("_moves", "begin", "count", "front", "gap", "has_float8", "index", "length")

    def __init__(self, store: ContiguousStore, count: int, before: int, gap: int) -> None:
        device = store.planes[0].device
        self.start, self.length, self.count = store.start + gap, store.length - gap + count, count
        self.front, self.gap = before if gap else 0, gap
        self.begin = self.start + self.length - count
        self.before = Layout(self.length - count, self.start)
        is_indexed = count < _FEW and device.type == "cpu"
        self.index = torch.arange(self.begin, self.begin + count) if is_indexed else None
        self.has_float8 = any(is_float8(plane.dtype) for plane in store.planes)
        self._moves: tuple[torch.Tensor, torch.Tensor] | None = None

    def moves(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources and targets of the tokens that move, int64 `[n]` each."""
        if self._moves is None:
            targets = torch.arange(self.start, self.start + self.front, device=device)
            self._moves = targets - self.gap, targets
        return self._moves


class ContiguousStore(Store):
    """Buffers `[B, H_i, C, d_i]` that hold tokens in the slots from `start` on, always as one slice.

    Dropping from the middle moves the shorter side over the gap (a window's few sinks), so reading is a
    slice and never a copy. When the buffer's end is reached, the held tokens move back to its start; with a
    slack in proportion to the tokens held that costs O(1) a token.
    """

    def __init__(self, *, bound: int | None = None, tokens_innermost: tuple[int, ...] = ()) -> None:
        super().__init__(bound=bound, tokens_innermost=tokens_innermost)
        self.start = 0

    @property
    def reads_slices(self) -> bool:
        return True

    @property
    def capacity(self) -> int:
        return self.planes[0].shape[2] if self.planes else 0

    def append(self, new: Planes) -> None:
        count = new[0].shape[2]
        if not self.planes:
            self.device = new[0].device
            wanted = max(count, self._cap(self.reserved))
            self.allocate_reserved(count, wanted, lambda capacity: self._allocate(new, capacity))
        before = self.extend(count)
        first = before.start + before.length
        for plane, tokens in zip(self.planes, new, strict=True):
            plane.narrow(2, first, count).copy_(tokens)

    def extend(self, count: int) -> Layout:
        if self.start + self.length + count > self.capacity:
            self._make_room(self.length + count)
        before = self.layout()
        self.length += count
        return before

    @property
    def extent(self) -> object:
        return (self.start, self.length, self.planes[0].shape[2]) if self.planes else None

    def placing(self, count: int, start: int, stop: int) -> Placing | None:
        gap = max(stop - start, 0)
        if not self.planes or self.start + self.length + count > self.capacity:
            return None
        if gap and (start >= self.length - stop or self._is_to_shrink(gap)):
            return None
        return _Slots(self, count, start, gap)

    def put(self, placing: Placing, new: Planes | None) -> None:
        assert isinstance(placing, _Slots)
        index, planes = placing.index, self.planes
        if new is not None:
            if placing.front:
                self.shift(placing)
            for plane, tokens in zip(planes, new, strict=True):
                if index is None:
                    plane.narrow(2, placing.begin, placing.count).copy_(tokens)
                elif placing.has_float8:
                    bits_of(plane).index_copy_(2, index, bits_of(tokens))
                else:
                    plane.index_copy_(2, index, tokens)
        self.start, self.length = placing.start, placing.length
        if placing.gap:
            self.version += 1

    def shift(self, placing: Placing) -> None:
        assert isinstance(placing, _Slots)
        if placing.front:
            sources, targets = placing.moves(self.planes[0].device)
            for plane in map(bits_of, self.planes) if placing.has_float8 else self.planes:
                plane.index_copy_(2, targets, plane.index_select(2, sources))

    def _is_to_shrink(self, gap: int) -> bool:
        """Whether the planes are to be smaller once `gap` tokens have gone: after a prompt longer than a window."""
        is_over = self.bound is not None and self.length - gap <= self.bound
        return is_over and self.capacity > GROWTH * self._limit()

    def drop(self, start: int, stop: int) -> None:
        gap = stop - start
        if gap <= 0:
            return
        self.version += 1
        before, after = start, self.length - stop
        if before < after:
            self._move(self.start, self.start + gap, before)
            self.start += gap
        else:
            self._move(self.start + stop, self.start + start, after)
        is_to_shrink = self._is_to_shrink(gap)
        self.length -= gap
        if is_to_shrink:
            with contextlib.suppress(MemoryError):  # there will be another time
                self._reallocate(self._limit())

    def write(self, start: int, new: Planes) -> None:
        self.version += 1
        first = self.start + start
        for plane, tokens in zip(self.planes, new, strict=True):
            plane[:, :, first : first + tokens.shape[2]].copy_(tokens)

    def select(self, rows: torch.Tensor) -> None:
        self.version += 1
        if self.keeps_place and self.planes and len(rows) == len(self.planes[0]):
            for plane in self.planes:
                held = plane[:, :, self.start : self.start + self.length]
                held.copy_(held.index_select(0, rows.to(plane.device)))
            return
        selected = []
        for plane in self.planes:
            target = self.allocate((len(rows), *plane.shape[1:]), like=plane)
            selected.append(torch.index_select(plane, 0, rows.to(plane.device), out=target))
        self.planes = selected

    def fork(self, rows: torch.Tensor) -> ContiguousStore:
        """Copies the held tokens; see `Store.fork`."""
        forked = ContiguousStore(bound=self.bound, tokens_innermost=self.tokens_innermost)
        forked.device, forked.length = self.device, self.length
        held = slice(self.start, self.start + self.length)
        for plane in self.planes:
            copy = forked.allocate((len(rows), plane.shape[1], self.length, plane.shape[3]), like=plane)
            forked.planes.append(copy.copy_(plane[:, :, held].index_select(0, rows.to(plane.device))))
        return forked

    def layout(self) -> Layout:
        return Layout(self.length, self.start)

    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        begin, end = self.start + first, self.start + (self.length if last is None else last)
        if rows == slice(None):
            found = [plane.narrow(2, begin, end - begin) for plane in self.planes[which]]
        else:
            found = [plane[rows, :, begin:end] for plane in self.planes[which]]
        return tuple(map(by_token, found) if self.tokens_innermost else found)

    def held_tokens(self) -> int:
        return len(self.planes[0]) * self.length if self.planes else 0

    def _limit(self) -> int:
        """The capacity that a window needs: its tokens and some slack."""
        assert self.bound is not None
        return self._aligned(self.bound + max(LEAST_SLACK, min(self.bound // 4, WINDOW_SLACK)))

    def _aligned(self, tokens: int) -> int:
        return tokens + -tokens % ALIGNED_TOKENS if self.tokens_innermost else tokens

    def _cap(self, tokens: int) -> int:
        return tokens if self.bound is None else min(tokens, self._limit())

    def _make_room(self, needed: int) -> None:
        # Below its limit a window's buffer grows instead: moving with too little slack would copy at every step.
        if needed <= self.capacity and (self.bound is None or self.capacity >= self._limit()):
            self._move(self.start, 0, self.length)
            self.start = 0
        else:
            grown = max(int(self.capacity * GROWTH), self.reserved)
            self.allocate_reserved(needed, max(needed, self._cap(grown)), self._reallocate)

    def _reallocate(self, capacity: int) -> None:
        old, first = self.planes, self.start
        self._allocate(old, capacity)
        for plane, source in zip(self.planes, old, strict=True):
            plane[:, :, : self.length].copy_(source[:, :, first : first + self.length])

    def _allocate(self, like: Planes | list[torch.Tensor], capacity: int) -> None:
        capacity = self._aligned(capacity)
        self.planes = self.take_lent(like, [(2, capacity)]) or self.blanks(like, len(like[0]), capacity)
        self.start = 0

    def _move(self, source: int, target: int, count: int) -> None:
        if count == 0 or source == target:
            return
        overlaps = abs(source - target) < count
        for plane in self.planes:
            tokens = plane[:, :, source : source + count]
            plane[:, :, target : target + count].copy_(tokens.clone() if overlaps else tokens)
