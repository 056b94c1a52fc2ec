"""`Rows`: copies, reorders and selects the rows of a layer."""

from __future__ import annotations

from typing import Any, Self

import torch

from hfkv.cache.layers.assignment import Assignment
from hfkv.cache.layers.span import Span
from hfkv.cache.selection import reordered, repeated, selected
from hfkv.cache.snapshot import Captured
from hfkv.cache.step import Member
from hfkv.cache.twin import twin_of
from hfkv.policy.config import KVConfig
from hfkv.stores import Store, copy_rows, is_worth_pages


class Rows(Member):
    """The rows of a `KVLayer`; copies of a row share pages until they are written to."""

    kv: KVConfig
    span: Span
    is_initialized: bool
    device: torch.device
    _store: Store | None
    _copies: tuple[int, int]
    _batch: int
    _reserved: int
    _assignment: Assignment
    captured: Captured | None

    def expect_copies(self, copies: int, tokens: int) -> None:
        """Announces copies of rows: ``store="auto"`` takes pages then, which copies share, if rows are to be long.

        Args:
            copies: number of copies of each row.
            tokens: number of tokens that a row will hold when it is copied.
        """
        if not self.is_initialized:
            self._copies = (copies, tokens)

    def fork(self, repeats: int = 1) -> Self:
        """Copies the layer: the copy holds every row `repeats` times."""
        forked = twin_of(self)
        forked.span = self.span.copy()
        forked._assignment = Assignment()
        forked.captured = None
        forked._leave_step()
        forked._reserved = 0
        if self._store is not None:
            rows = repeated(repeats, self._batch)
            forked.hold(copy_rows(self._store, rows, self.kv.store, self.kv.page_size, self.group.changes), rows)
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
        """Repeats every row `repeats` times; ``store="auto"`` goes over to pages where rows are to be long."""
        store = self._store
        if store is None:
            return
        rows = repeated(repeats, self._batch)
        goes_over = self.kv.store == "auto" and not store.is_paged and len(rows) > self._batch
        if goes_over and is_worth_pages(max(store.length, store.reserved), self.device, self.kv.page_size, store.bound):
            self.hold(copy_rows(store, rows, "auto", self.kv.page_size, self.group.changes), rows)
        else:
            self._select(rows)

    def hold(self, store: Store, rows: torch.Tensor) -> None:
        """Takes `store` as its own; row i of it is what row `rows[i]` was."""
        self._store = store
        self._change()
        self.span.padding.select(rows.tolist())
        self._batch = len(rows)
