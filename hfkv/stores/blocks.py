"""`BlockPool`: the ids of blocks, as a free list and reference counts, without tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Hands out block ids `0 .. size - 1`; a block is free again when its last holder releases it.

    Args:
        on_free: function that is called with the blocks that have become free.
    """

    def __init__(self, on_free: Callable[[list[int]], None] | None = None) -> None:
        self._on_free = on_free
        self.refcounts: list[int] = []
        self.free: list[int] = []

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, BlockPool):
            return self is other
        return (self.free, self.refcounts) == (other.free, other.refcounts)

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> BlockPool:
        """Copies the counts."""
        twin = BlockPool(self._on_free)
        twin.refcounts, twin.free = list(self.refcounts), list(self.free)
        return twin

    @property
    def size(self) -> int:
        return len(self.refcounts)

    @property
    def used(self) -> int:
        return len(self.refcounts) - len(self.free)

    def grow(self, size: int) -> None:
        """Adds free blocks up to `size` in all."""
        self.free.extend(range(size - 1, self.size - 1, -1))
        self.refcounts.extend([0] * (size - self.size))

    def take(self, count: int) -> list[int]:
        """Takes `count` free blocks, with one holder each; the caller has made sure that there are as many."""
        blocks = [self.free.pop() for _ in range(count)]
        for block in blocks:
            self.refcounts[block] = 1
        return blocks

    def occupy(self, blocks: Sequence[int]) -> None:
        """Adds a holder to each of `blocks`, some of which may be free."""
        held = set(blocks)
        self.free = [block for block in self.free if block not in held]
        self.retain(blocks)

    def retain(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each of `blocks`."""
        for block in blocks:
            self.refcounts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Takes a holder from each of `blocks`."""
        before = len(self.free)
        for block in blocks:
            self.refcounts[block] -= 1
            if self.refcounts[block] == 0:
                self.free.append(block)
        if self._on_free is not None and len(self.free) > before:
            self._on_free(self.free[before:])

    def is_shared(self, block: int) -> bool:
        """Whether `block` has more than one holder."""
        return self.refcounts[block] > 1

    def is_any_shared(self, blocks: Iterable[int]) -> bool:
        """Whether any of `blocks` has more than one holder."""
        refcounts = self.refcounts
        return any([refcounts[block] > 1 for block in blocks])
