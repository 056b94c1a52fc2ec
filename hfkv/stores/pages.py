"""`Pages`: planes of pages that the block tables of several stores list."""

from __future__ import annotations

import threading
from collections.abc import Iterable
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
        blocks: reference counts of the pages.
        lock: lock that its thread may take again.
        stores: number of stores that list these pages.
    """

    def __init__(self) -> None:
        self.planes: list[torch.Tensor] = []
        self.blocks = BlockPool()
        self.lock = threading.RLock()
        self.stores = 0

    def join(self, pages: Iterable[int]) -> None:
        """Counts one more store, which lists `pages`."""
        with self.lock:
            self.stores += 1
            self.blocks.retain(pages)

    def leave(self, pages: Iterable[int]) -> None:
        """Counts one store less, which listed `pages`."""
        with self.lock:
            self.stores -= 1
            self.blocks.release(pages)

    def are_used(self) -> bool:
        """Whether any store lists these pages."""
        return self.stores > 0

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "lock"}
        return kept | {"planes": to_pickle(self.planes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"planes": from_pickle(state["planes"])})
        self.lock = threading.RLock()
