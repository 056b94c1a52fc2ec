"""What is done with the rows of a layer: copied, reordered, selected."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from hfkv.assignment import Assignment
from hfkv.config import KVConfig
from hfkv.selection import reordered, repeated, selected
from hfkv.span import Span
from hfkv.stores import PagedStore, Store, copy_rows

if TYPE_CHECKING:
    from hfkv.layer import KVLayer


class Rows:
    """The rows of a `KVLayer`; copies of a row share pages until they are written to."""

    kv: KVConfig
    span: Span
    is_initialized: bool
    _store: Store | None
    _store_kind: str
    _copies: tuple[int, int]
    _batch: int

    def expect_copies(self, copies: int, tokens: int) -> None:
        """Says that rows will be copied: ``store="auto"`` takes pages then, which copies share.

        Args:
            copies: of each row.
            tokens: a row will hold so many when it is copied.
        """
        if not self.is_initialized:
            self._store_kind = "paged" if self.kv.store == "auto" else self.kv.store
            self._copies = (copies, tokens)

    def fork(self, repeats: int = 1) -> Self:
        """A layer of its own that holds every row `repeats` times."""
        forked = cast("KVLayer", copy.copy(self))
        forked.span = self.span.copy()
        forked._assignment = Assignment()
        forked.captured = None
        forked._reserved = 0
        if self._store is not None:
            rows = repeated(repeats, self._batch)
            forked._hold(copy_rows(self._store, rows, self.kv.store), rows)
        return cast("Self", forked)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        if self._store is not None:
            self._select(reordered(beam_idx, self._batch))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows `indices`, whatever a tensor can be indexed with; see `selected`."""
        if self._store is not None:
            self._select(selected(indices, self._batch))

    def _select(self, rows: torch.Tensor) -> None:
        assert self._store is not None
        self._store.select(rows)
        self._hold(self._store, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; ``store="auto"`` goes over to pages."""
        if self._store is None:
            return
        if self.kv.store != "auto" or isinstance(self._store, PagedStore):
            self._select(repeated(repeats, self._batch))
        else:
            rows = repeated(repeats, self._batch)
            self._hold(copy_rows(self._store, rows, "auto"), rows)

    def _hold(self, store: Store, rows: torch.Tensor) -> None:
        """Takes `store`, of which row i is what row `rows[i]` was."""
        self._store = store
        self.span.padding.select(rows.tolist())
        self._batch = len(rows)
