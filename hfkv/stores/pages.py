"""`Pages`: planes of pages that the block tables of several stores list."""

from __future__ import annotations

import threading
from typing import Any

import torch

from hfkv.stores.blocks import BlockPool
from hfkv.stores.pickling import from_pickle, to_pickle


class Pages:
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, and the pages' reference counts.

    Forks of a cache list the same pages and may be used by different threads: a thread holds `lock` while it takes,
    releases or writes pages. Growing puts new planes in place of the old ones; a thread that still reads the old ones
    reads the same tokens.

    Attributes:
        planes: planes of the pages, none until the first tokens come.
        blocks: reference counts of the pages. Stores remember them: see `changeable`.
        lock: lock that its thread may take again.
        stores: number of stores that list these pages.
        moves: while a store works out what to do, what it has done to the planes; None in between.
        left: block tables of stores that the garbage collector has taken meanwhile.
    """

    def __init__(self) -> None:
        self.planes: list[torch.Tensor] = []
        self.blocks = BlockPool()
        self.lock = threading.RLock()
        self.stores = 0
        self.moves: list[Any] | None = None
        self.left: list[Any] = []

    def changeable(self) -> BlockPool:
        """The counts, for a caller that holds the lock and changes them; those that were stay as they were."""
        self.blocks = self.blocks.copy()
        return self.blocks

    def are_used(self) -> bool:
        """Whether any store lists these pages."""
        return self.stores > 0

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "lock"}
        return kept | {"planes": to_pickle(self.planes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"planes": from_pickle(state["planes"])})
        self.lock = threading.RLock()
