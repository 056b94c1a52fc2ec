"""Bytes allocated: of storages, each once, however many tensors lie in it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hfkv.measure.allocated import cache_bytes, storage_bytes


def test_a_storage_counts_once_and_whole() -> None:
    whole = torch.zeros(2, 3, 4)
    assert storage_bytes([whole, whole[0], whole[1, :, :2], torch.zeros(5, dtype=torch.int8)]) == 96 + 5
    meta = [torch.zeros(4, device="meta") for _ in range(2)]  # all at the same address
    assert storage_bytes([*meta, meta[0][:1]]) == 32


def test_a_cache_of_transformers_own_takes_the_bytes_of_its_storages() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache_bytes(cache) == 192
    layer = cache.layers[0]
    layer.keys, layer.values = torch.zeros(2, 1, 2, 3, 4)
    assert cache_bytes(cache) == 192  # both halves of one storage, which counts once
    with pytest.raises(TypeError, match="expected a KV cache"):
        cache_bytes(torch.zeros(1))
