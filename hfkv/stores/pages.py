"""`Pages`: planes of pages that the block tables of several stores list."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Self

import torch

from hfkv.stores.block_table import BlockTable
from hfkv.stores.blocks import BlockPool
from hfkv.stores.pickling import from_pickle, to_pickle


class Pages:
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, and the pages' reference counts.

    Forks of a cache list the same pages and may be used by different threads: ``with pages:`` a thread takes, releases
    or writes pages, and may say so again inside. Growing puts new planes in place of the old ones; a thread that still
    reads the old ones reads the same tokens.

    Attributes:
        planes: planes of the pages, none until the first tokens come.
        blocks: reference counts of the pages. Stores remember them, and others read them at any time: they are never
            changed, others take their place.
        lock: lock for a thread that only writes to pages of its own.
        stores: number of stores that list these pages.
    """

    def __init__(self) -> None:
        self.planes: list[torch.Tensor] = []
        self.blocks = BlockPool()
        self.stores = 0
        self._left: list[BlockTable] = []
        self._unlock()

    def _unlock(self) -> None:
        self.lock = threading.RLock()
        self._depth = 0

    def __enter__(self) -> Self:
        self.lock.acquire()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        try:
            while self._depth == 1 and self._left:
                self.stores -= 1
                self.release(self._left.pop().pages)
        finally:
            self._depth -= 1
            self.lock.release()

    def join(self, table: BlockTable) -> None:
        """Counts a store that comes out of a pickle, where the counts are those of stores that may not be in it."""
        with self:
            self.stores += 1
            after = self.blocks.copy()
            after.occupy(table.pages)
            self.blocks = after

    def leave(self, table: BlockTable) -> None:
        """Counts one store less, which listed the pages of `table`, as soon as nobody is at work.

        The garbage collector calls, at any time: also in the midst of a thread's work on these pages.
        """
        self._left.append(table)
        with self:
            pass

    def release(self, pages: Sequence[int]) -> None:
        """Takes a holder from each of `pages`; the caller holds the lock."""
        after = self.blocks.copy()
        after.release(pages)
        self.blocks = after

    def are_used(self) -> bool:
        """Whether any store lists these pages."""
        return self.stores > 0

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name not in ("lock", "_depth")}
        return kept | {"planes": to_pickle(self.planes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"planes": from_pickle(state["planes"])})
        size, self.blocks = self.blocks.size, BlockPool()
        self.blocks.grow(size)
        self.stores, self._left = 0, []  # stores join one by one
        self._unlock()
