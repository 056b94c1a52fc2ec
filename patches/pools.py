"""The pools of prompt prefixes, one for each patched model."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from hfkv.policy.config import KVConfig
from hfkv.sharing.prefix_pool import PrefixPool

PAGE_SIZE = 64

# Beside the patches, so that a copy of one begins with an empty pool.
_pools: weakref.WeakKeyDictionary[Any, PrefixPool] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def pool_of(patch: Any, kv: KVConfig) -> PrefixPool:
    """The pool of one patch, made when it is first asked for.

    Raises:
        RuntimeError: the patch was made without reuse.
    """
    if kv.reuse is None:
        raise RuntimeError(f"this model was patched without reuse: hfkv.patch(model, kv='{kv}+reuse')")
    with _lock:
        if patch not in _pools:
            _pools[patch] = PrefixPool(kv.reuse.budget_bytes, kv.page_size or PAGE_SIZE)
        return _pools[patch]


def drop_pool(patch: Any) -> None:
    """Drops the pool of a patch."""
    with _lock:
        _pools.pop(patch, None)
