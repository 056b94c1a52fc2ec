"""Four names for `KVCache`: one policy each, the others as keywords."""

from __future__ import annotations

from typing import Any

from hfkv.cache.kv_cache import KVCache
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window


def _config(name: str, policies: dict[str, Any], **fixed: Any) -> KVConfig:
    """The config of a named cache, which fixes one policy."""
    for field, value in fixed.items():
        if policies.get(field, value) != value:
            raise TypeError(
                f"{name} has {field}={value!r}, got {field}={policies[field]!r}; leave it out, or build a KVCache with "
                "KVConfig"
            )
    return KVConfig(**{**policies, **fixed})


class SlidingWindowCache(KVCache):
    """Keeps the newest `window` tokens, or those that a `Window` names; other policies as keywords of `KVConfig`.

    Args:
        config_or_model: see `KVCache`.
        window: size in tokens, or a `Window`.
        sinks: number of first tokens that stay for good; only where `window` is a size.
    """

    def __init__(self, config_or_model: Any, window: Window | int, sinks: int | None = None, **policies: Any) -> None:
        if isinstance(window, Window) and sinks is not None:
            raise ValueError("SlidingWindowCache was given a Window and sinks; say the sinks in the Window")
        if not isinstance(window, Window):
            window = Window(window) if sinks is None else Window(window, sinks)
        super().__init__(config_or_model, KVConfig(window=window, **policies))


class QuantizedCache(KVCache):
    """Keeps every token in fewer bits, such as ``"k:int8+v:int4"``; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, codec: str = "int8", **policies: Any) -> None:
        super().__init__(config_or_model, KVConfig(codec=codec, **policies))


class OffloadedCache(KVCache):
    """Keeps every token in host memory; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, **policies: Any) -> None:
        super().__init__(config_or_model, _config("OffloadedCache", policies, offload=True))


class PagedCache(KVCache):
    """Keeps every token in pages that beams share; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, page_size: int | None = None, **policies: Any) -> None:
        super().__init__(config_or_model, _config("PagedCache", {"page_size": page_size, **policies}, store="paged"))
