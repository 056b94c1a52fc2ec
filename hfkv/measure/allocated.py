"""Bytes that tensors and caches have allocated, and which caches there are."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# The caches that are in use anywhere, forks included: a MemoryMonitor counts them.
_live: weakref.WeakSet[Any] = weakref.WeakSet()
_live_lock = threading.Lock()


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the unique storages behind `tensors`."""
    # Not by address: every tensor on the meta device has the same.
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def own_tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a layer of transformers' own cache holds, by the names of its attributes."""
    for name, value in list(vars(layer).items()):
        named = [(f"{name}[{key!r}]", part) for key, part in list(value.items())] if isinstance(value, dict) else None
        for part_name, part in named or [(name, value)]:
            if isinstance(part, torch.Tensor):
                yield part_name, part


def count_as_live(cache: Any) -> None:
    """Adds a cache to those in use, for as long as something holds it."""
    with _live_lock:
        _live.add(cache)


def live_caches() -> list[Any]:
    """The hfkv caches that are in use in this process; some may not be complete yet."""
    with _live_lock:
        return list(_live)


def cache_bytes(cache: Any) -> int:
    """The bytes allocated by a cache, hfkv's or transformers'.

    Raises:
        TypeError: it is neither.
    """
    if callable(getattr(cache, "nbytes", None)):
        return cache.nbytes()
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if parts[0] is not None:
        return sum(cache_bytes(part) for part in parts if part is not None)
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise TypeError(f"expected a KV cache, such as an hfkv.KVCache, got {type(cache).__name__}")
    return storage_bytes([tensor for layer in list(layers) for _, tensor in own_tensors(layer)])
