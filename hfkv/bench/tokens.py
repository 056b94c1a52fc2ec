"""`Tokens`: the random keys and values every contender is filled with, and the bytes a cache has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hfkv.cache.kv_cache import KVCache
from hfkv.measure.allocated import storage_bytes
from hfkv.models.shapes import Heads

# A codec's temporaries are of this many tokens.
FILL_CHUNK = 4096


class Tokens:
    """Keys and values `[B, H, T, D]` of normal numbers for one layer, the same for all layers and contenders."""

    def __init__(
        self, batch: int, count: int, heads: Heads, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.count = count
        generator = torch.Generator(device).manual_seed(seed)

        def draw(num_heads: int, num_tokens: int) -> torch.Tensor:
            shape = (batch, num_heads, num_tokens, heads.head_dim)
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        self.keys, self.values = draw(heads.kv_heads, count), draw(heads.kv_heads, count)
        self.new_key, self.new_value = draw(heads.kv_heads, 1), draw(heads.kv_heads, 1)
        self.query = draw(heads.query_heads, 1)

    def fill(self, cache: Any, num_layers: int, tokens: int) -> Any:
        """Puts all of them into the first layers of an empty cache whose rows will hold so many, and returns it."""
        is_ours = isinstance(cache, KVCache)
        if is_ours:
            cache.reserve(tokens)
        # Quantised peers keep apart what comes after the first append. Windows drop at the next one: their last token
        # comes alone, as in generation.
        starts = [*range(0, self.count - 1, FILL_CHUNK), self.count - 1] if is_ours else [0]
        for layer in range(num_layers):
            for start, end in zip(starts, (*starts[1:], self.count), strict=True):
                new = (states[:, :, start:end] for states in (self.keys, self.values))
                cache.update(*new, layer)
        return cache


def held_bytes(cache: Any, layers: int) -> int:
    """Bytes of the tokens in the first layers of any cache; 0 without one."""
    if isinstance(cache, KVCache):
        return sum(layer.held_bytes() for layer in cache.layers[:layers])
    total = 0
    for layer in _layers(cache, layers):
        num_bytes, capacity = storage_bytes(_tensors(vars(layer))), getattr(layer, "max_cache_len", None)
        total += num_bytes * int(layer.get_seq_length()) // capacity if capacity else num_bytes
    return total


def allocated_bytes(cache: Any, layers: int) -> int:
    """Bytes allocated for the first layers of any cache; 0 without one."""
    if isinstance(cache, KVCache):
        return sum(layer.nbytes() for layer in cache.layers[:layers])
    return sum(storage_bytes(_tensors(vars(layer))) for layer in _layers(cache, layers))


def bus_bytes(cache: Any, layers: int) -> int | None:
    """Bytes of the first layers of a cache of ours that are not on the device and have to come; None where none are."""
    if not isinstance(cache, KVCache) or cache.offload is None:
        return None
    rows = [row for row in cache.memory().rows if row.layer is not None and row.layer < layers]
    elsewhere = sum(row.held_bytes for row in rows if row.device.type == "cpu")
    return elsewhere if any(row.device.type != "cpu" for row in rows) else None


def _layers(cache: Any, layers: int) -> list[Any]:
    return [] if cache is None else cache.layers[:layers]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in attributes of a layer: in tuples and dicts (hqq), and inside tensor subclasses (quanto)."""
    if hasattr(value, "__tensor_flatten__"):
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
