"""`CacheMemoryError`: there is no memory for more tokens, and the cache as it was before."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfkv.cache import KVCache


class CacheMemoryError(MemoryError):
    """A forward found no memory for its keys and values.

    Attributes:
        cache: holds what it held before that forward, in every layer, and can go on. Under ``offload`` a patched model
            has written down which tokens these are: ``cache.holds_tokens``.
    """

    def __init__(self, message: str, cache: KVCache) -> None:
        super().__init__(message)
        self.cache = cache

    @classmethod
    def of(cls, error: Exception, cache: KVCache) -> CacheMemoryError:
        """What to raise where a forward found no memory and `cache` has been taken back."""
        return cls(
            f"{error}. The {cache.get_seq_length():,} tokens read before are still held: the `cache` of this error "
            "goes on with them (past_key_values=error.cache) once there is memory",
            cache,
        )
