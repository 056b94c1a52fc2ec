"""Attention never holds a decoded copy of what a layer holds, nor a large part of one."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hfkv.attention.function import hfkv_attention
from hfkv.attention.masks import CausalMask
from hfkv.cache.layers.layer import KVLayer
from hfkv.policy.config import KVConfig

HELD, HEADS, GROUPS, HEAD_DIM = 32_768, 2, 4, 128
DECODED = 2 * HEADS * HELD * HEAD_DIM * 4  # bytes of all keys and values in float32


class Peak(TorchDispatchMode):
    """The most bytes of tensors made by operations that are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if type(leaf) is torch.Tensor}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if type(tensor) is not torch.Tensor:
                continue
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if place in given and place not in self.holders:
                continue  # of the cache, or of what was there before
            if place not in self.holders:
                self.alive += size
            self.holders[place] += 1
            weakref.finalize(tensor, self._release, place, size)
        self.peak = max(self.peak, self.alive)
        return result

    def _release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.alive -= size


def attend(layer: KVLayer, num_queries: int, padding: int) -> int:
    """The peak of one forward of `num_queries` more tokens."""
    new = [torch.randn(1, HEADS, num_queries, HEAD_DIM) for _ in range(2)]
    query = torch.randn(1, HEADS * GROUPS, num_queries, HEAD_DIM)
    seen = layer.get_seq_length() + num_queries
    real = torch.ones(1, seen, dtype=torch.bool)
    real[:, :padding] = False
    module = torch.nn.Module()
    module.config, module.is_causal = None, True  # type: ignore[assignment]
    with torch.no_grad(), Peak() as peak:
        key, value = layer.update(*new)
        mask = CausalMask(1, num_queries, seen, real, "cpu")
        hfkv_attention(module, query, key, value, mask, scaling=HEAD_DIM**-0.5)
    return peak.peak


def filled(kv: str) -> KVLayer:
    layer = KVLayer(KVConfig.parse(kv))
    layer.reserve(HELD + 1024)
    for _ in range(HELD // 2048):
        layer.update(*(torch.randn(1, HEADS, 2048, HEAD_DIM) for _ in range(2)))
    return layer


@pytest.mark.pairwise
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("num_queries", [1, 7, 300])
@pytest.mark.parametrize("kv", ["none", "paged", "int8", "int4", "fp8", "int8+paged", "int4+paged"])
def test_a_step_and_a_chunk(kv: str, num_queries: int, padding: int) -> None:
    assert attend(filled(kv), num_queries, padding) < DECODED / 4


@pytest.mark.parametrize("num_queries", [1, 300])
@pytest.mark.parametrize("window", ["window:30000", "window:30000+sink_positions:cache"])
@pytest.mark.parametrize("kv", ["int8", "int8+paged", "int4"])
def test_a_large_window(kv: str, window: str, num_queries: int) -> None:
    layer = filled(f"{kv}+{window}")
    assert layer.get_mask_sizes(0)[0] > 30_000
    assert attend(layer, num_queries, 0) < DECODED / 4


def test_a_decoded_copy_would_be_seen() -> None:
    layer = filled("int8")
    with Peak() as peak:
        layer.keys + 0
    assert peak.peak >= DECODED / 2
