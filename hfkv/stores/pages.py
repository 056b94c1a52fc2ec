"""`Pages`: planes of pages that the block tables of several stores list."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch

from hfkv.stores.blocks import BlockPool


class Pages:
    """Planes `[N, H_i, P, d_i]` of N pages of P tokens, and who holds which.

    Forks of a cache list the same pages and may be used by different threads: whoever takes, releases or writes pages
    holds `lock` meanwhile. Growing puts new planes in place of the old ones; who still reads those reads the same
    tokens.

    Attributes:
        planes: empty until the first tokens come.
        blocks: the pages' reference counts.
        lock: may be taken again by the thread that has it.
        stores: how many stores list pages of these.
    """

    def __init__(self) -> None:
        self.planes: list[torch.Tensor] = []
        self.blocks = BlockPool()
        self.lock = threading.RLock()
        self.stores = 0

    def join(self, pages: Iterable[int]) -> None:
        """One more store lists `pages`."""
        with self.lock:
            self.stores += 1
            self.blocks.retain(pages)

    def leave(self, pages: Iterable[int]) -> None:
        """A store that listed `pages` is gone."""
        with self.lock:
            self.stores -= 1
            self.blocks.release(pages)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = threading.RLock()
