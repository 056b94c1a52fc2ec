"""Errors that several rooms raise or catch."""

from __future__ import annotations

from typing import Any


class CacheMemoryError(MemoryError):
    """A forward found no memory for its keys and values.

    Attributes:
        cache: the `KVCache`; it holds what it held before that forward, in every layer, and can go on. Under
            ``offload`` a patched model has written down which tokens these are: ``cache.holds_tokens``. None in a copy
            of the error that another process was sent (pickle).
    """

    def __init__(self, message: str, cache: Any) -> None:
        super().__init__(message)
        self.cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        # Its cache is as large as memory: another process is told of the error alone.
        message = str(self) if self.cache is None else f"{self}. This copy of the error came without its cache"
        state = {name: value for name, value in vars(self).items() if name != "cache"}
        return type(self), (message, None), state

    @classmethod
    def of(cls, error: Exception, cache: Any) -> CacheMemoryError:
        """The error to raise where a forward found no memory and `cache` has been taken back."""
        return cls(
            f"{error}. The {cache.get_seq_length():,} tokens read before are still held: the `cache` of this error "
            "goes on with them (past_key_values=error.cache) once there is memory",
            cache,
        )


class RequestError(ValueError):
    """What was asked for cannot be done: what was given, what is allowed and the remedy."""
