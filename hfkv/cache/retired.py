"""`Retired`: the planes of a cache, for the next one of its kind once nobody uses the first any more."""

from __future__ import annotations

import weakref

from hfkv.cache.kv_cache import KVCache


class Retired:
    """Keeps the planes of a cache that has been filled.

    What reads them where they lie, as a captured graph does, goes on with the cache that takes them over.

    Args:
        cache: a cache of which every layer is hfkv's and holds something.

    Attributes:
        rows: number of rows of the cache.
    """

    def __init__(self, cache: KVCache) -> None:
        self.kv, self.rows = cache.kv, cache.batch_size
        self.hold(cache)

    def hold(self, cache: KVCache) -> None:
        """Keeps the planes of `cache`, which has taken them over."""
        self._owner = weakref.ref(cache)
        stores = [leaf.store for leaf in cache.leaves]
        self._planes = [list(store.planes) for store in stores]
        self._stores = [weakref.ref(store) for store in stores]
        self._checks = [store.is_used_elsewhere() for store in stores]

    def is_of(self, cache: KVCache) -> bool:
        """Whether the planes are those of `cache`."""
        return self._owner() is cache

    @property
    def is_gone(self) -> bool:
        """Whether the cache is gone; copies of it, its layers, or views of them may still be there."""
        return self._owner() is None

    @property
    def is_free(self) -> bool:
        """Whether nobody uses the planes any more."""
        is_held = any(store() is not None for store in self._stores) or any(check() for check in self._checks)
        return self.is_gone and not is_held

    def lend_to(self, cache: KVCache) -> None:
        """Gives the planes to an empty cache; where they do not fit, it lets go of them."""
        for leaf, planes in zip(cache.leaves, self._planes, strict=True):
            leaf.lend(planes)
        self._planes, self._owner = [], weakref.ref(cache)
