"""`IndexedLayer`: latents, and the keys by which an indexer picks among them (DeepSeek Sparse Attention)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from hfkv.cache.layers.contents import Contents
from hfkv.cache.layers.layer import KVLayer
from hfkv.stores import ContiguousStore, Store


class IndexedLayer(KVLayer):
    """`KVLayer` with the keys of an indexer, one a token, which stay on the device as they are.

    Args:
        kv: policies of the layer, without a window: the indexer picks among all tokens.
    """

    extra_name = "indexer keys"

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._index: ContiguousStore | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Appends the indexer's keys `[B, T, d]`; returns the keys of all tokens, `[B, seen, d]`."""
        if self._index is None:
            self._index = ContiguousStore()
            self._index.reserve(self._reserved)
        self._index.append((indexer_key_states.detach()[:, None],))
        return self._index.read()[0][:, 0]

    def reserve(self, tokens: int) -> None:
        """See `KVLayer.reserve`."""
        super().reserve(tokens)
        if self._index is not None:
            self._index.reserve(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """See `KVLayer.crop`."""
        super().crop(tokens_to_remove)
        # After a forward that failed, keys may be missing already.
        if self._index is not None and self._index.length > self.span.seen:
            self._index.truncate(self.span.seen)

    def hold(self, store: Store, rows: torch.Tensor) -> None:
        super().hold(store, rows)
        self._index = None if self._index is None else self._index.fork(rows)

    @property
    def extras(self) -> list[str]:
        return ["keys of its indexer"]

    @property
    def sharing_refusal(self) -> str | None:
        return "picks tokens by an index, whose keys are not shared"

    def graph_refusal(self) -> str | None:
        return "picks tokens by an index, whose keys are not written where the device says"

    def extra_memory(self) -> list[Any]:
        """The bytes of the indexer's keys; see `Store.memory`."""
        return [] if self._index is None else self._index.memory()

    def contents(self) -> Contents | None:
        """None before the first key; then raises NotImplementedError: no file has a place for the indexer's keys."""
        if self.is_initialized:
            _refuse("saved")
        return None

    def adopt(self, contents: Contents) -> None:
        """Raises NotImplementedError: no contents have the indexer's keys."""
        _refuse("loaded")

    def _assign(self, part: Any, states: torch.Tensor | None) -> None:
        if states is not None:
            _refuse("assigned")


def _refuse(done: str) -> NoReturn:
    raise NotImplementedError(
        f"this layer's tokens cannot be {done} without the keys by which its indexer picks among them (sparse latent "
        "attention); prefill the prompt instead, or fork the cache"
    )
