"""`Storage`: the store that a layer holds its bytes in."""

from __future__ import annotations

import torch

from hfkv.cache.layers.span import ROLLBACK_MARGIN, Span
from hfkv.cache.snapshot import Part, PartShape
from hfkv.cache.step import Group
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.dispatch import wants_values_innermost
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window
from hfkv.stores import Budget, Offload, Place, Store, is_worth_pages, make_store


class Storage:
    """The store of a `KVLayer`, made when its device is known.

    Attributes:
        offloaded: place of the layer among the offloaded layers of a cache, or None.
        values_innermost: whether the next store keeps the tokens of encoded values side by side (see
            `hfkv.kernels.backend.Asked`); None where the kernel that reads them says so.
    """

    kv: KVConfig
    codecs: Codecs
    mean: KeyMean | None
    window: Window | None
    span: Span
    offloaded: Place | None = None
    values_innermost: bool | None = None
    group: Group
    _store: Store | None
    _copies: tuple[int, int]
    _reserved: int
    _num_slots: int
    _lent: list[torch.Tensor]
    _parts: dict[Part, PartShape]

    @property
    def store(self) -> Store:
        assert self._store is not None, "the layer has not seen a key yet"
        return self._store

    @property
    def reserved(self) -> int:
        """The number of tokens that there will be in all, as far as anybody has said."""
        return self._reserved

    @property
    def bound(self) -> int | None:
        """The most tokens that the window holds between two steps; None without one."""
        if self.window is None:
            return None
        return self.window.capacity() + (ROLLBACK_MARGIN if self.span.record_past else 0)

    def _bind(self) -> None:
        """Tells the store how many tokens there will be, once a layer records its past or no longer does."""
        if self._store is not None:
            self._store.bound = self.bound

    def offload_to(self, place: Place) -> None:
        """Shares a budget and staging buffers with the other layers of a cache."""
        self.offloaded = place
        if self._store is not None:
            self._store.move(place)

    def reserve(self, tokens: int) -> None:
        """Says how many tokens there will be in all, so that memory is allocated once."""
        self._reserved = tokens
        if self._store:
            self._store.reserve(tokens + self._num_slots)

    def lend(self, planes: list[torch.Tensor]) -> None:
        """Gives planes that nobody uses any more to the next store, which takes them if they fit."""
        self._lent = planes

    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        store = self._store  # another thread may reset the layer meanwhile
        return store.nbytes() if store else 0

    def held_bytes(self) -> int:
        """Bytes of the keys and values held."""
        store = self._store
        return store.held_bytes() if store else 0

    def _new_store(self, device: torch.device) -> Store:
        if self.kv.offload and self.offloaded is None:
            self.offloaded = Offload(Budget(None, [self.bound])).place(0)
        copies, tokens = self._copies
        kind = self.kv.store
        if kind == "auto" and copies > 1:
            is_worth = is_worth_pages(max(tokens, self._reserved), device, self.kv.page_size, self.bound)
            kind = "paged" if is_worth else "contiguous"
        store = make_store(
            kind,
            device,
            self.kv.page_size,
            offload=self.offloaded,
            bound=self.bound,
            tokens_innermost=self._planes_innermost(device),
            changes=self.group.changes,
        )
        store.expect_copies(copies, tokens)
        store.reserve(self._reserved + self._num_slots)
        store.lent, self._lent = self._lent, []
        return store

    def keeps_values_innermost(self, dtype: torch.dtype, device: torch.device, head_dims: tuple[int, int]) -> bool:
        """Whether a store that is made for keys of `dtype` and these widths keeps the tokens of values side by side."""
        if self.codecs.value.is_lossless:
            return False
        if self.values_innermost is not None:
            return self.values_innermost
        return wants_values_innermost(self.codecs.name, dtype, device, head_dims, self.mean is not None)

    def _planes_innermost(self, device: torch.device) -> tuple[int, ...]:
        """The planes of the next store whose tokens are to lie side by side: the values' data, or none."""
        key, value = self._parts["key"], self._parts["value"]
        is_so = self.keeps_values_innermost(key.dtype, device, (key.head_dim, value.head_dim))
        return (value.planes.start,) if is_so else ()
