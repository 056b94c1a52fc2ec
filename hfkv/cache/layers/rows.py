"""`Rows`: copies, reorders and selects the rows of a layer."""

from __future__ import annotations

from typing import Any, Self

import torch

from hfkv.cache.layers.assignment import Assignment
from hfkv.cache.layers.span import Span
from hfkv.cache.selection import reordered, repeated, selected
from hfkv.cache.snapshot import Captured
from hfkv.cache.step import Step
from hfkv.cache.twin import twin_of
from hfkv.policy.config import KVConfig
from hfkv.stores import Store, copy_rows


class Rows:
    """The rows of a `KVLayer`; copies of a row share pages until they are written to."""

    kv: KVConfig
    span: Span
    is_initialized: bool
    _store: Store | None
    _store_kind: str
    _copies: tuple[int, int]
    _batch: int
    _reserved: int
    _assignment: Assignment
    captured: Captured | None
    followed: Step | None

    def expect_copies(self, copies: int, tokens: int) -> None:
        """Announces copies of rows: ``store="auto"`` takes pages then, which copies share.

        Args:
            copies: number of copies of each row.
            tokens: number of tokens that a row will hold when it is copied.
        """
        if not self.is_initialized:
            self._store_kind = "paged" if self.kv.store == "auto" else self.kv.store
            self._copies = (copies, tokens)

    def fork(self, repeats: int = 1) -> Self:
        """Copies the layer: the copy holds every row `repeats` times."""
        forked = twin_of(self)
        forked.span = self.span.copy()
        forked._assignment = Assignment()
        forked.captured = forked.followed = None
        forked._reserved = 0
        if self._store is not None:
            rows = repeated(repeats, self._batch)
            forked.hold(copy_rows(self._store, rows, self.kv.store), rows)
        return forked

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes row i a copy of row `beam_idx[i]`."""
        if self._store is not None:
            self._select(reordered(beam_idx, self._batch))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows `indices`, anything that a tensor can be indexed with; see `selected`."""
        if self._store is not None:
            self._select(selected(indices, self._batch))

    def _select(self, rows: torch.Tensor) -> None:
        assert self._store is not None
        self._store.select(rows)
        self.hold(self._store, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; ``store="auto"`` goes over to pages."""
        if self._store is None:
            return
        if self.kv.store != "auto" or self._store.is_paged:
            self._select(repeated(repeats, self._batch))
        else:
            rows = repeated(repeats, self._batch)
            self.hold(copy_rows(self._store, rows, "auto"), rows)

    def hold(self, store: Store, rows: torch.Tensor) -> None:
        """Takes `store` as its own; row i of it is what row `rows[i]` was."""
        self._store, self.followed = store, None
        self.span.padding.select(rows.tolist())
        self._batch = len(rows)
