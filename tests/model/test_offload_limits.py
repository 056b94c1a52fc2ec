"""Where memory ends: what an offloaded cache says, and what is left."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig
from hfkv.stores import OffloadedStore, bus, staging
from tests.lazy_bus import LazyBus
from tests.tiny import greedy, llama, prompt


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts in several pages, and buffers of a few of them."""
    monkeypatch.setattr("hfkv.stores.CPU_PAGE_SIZE", 4)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 3000)


class Full(LazyBus):
    """Host memory that is full after so many allocations."""

    left = 0

    def allocate(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        type(self).left -= 1
        if self.left < 0:
            raise MemoryError("no more")
        return super().allocate(shape, dtype)


@pytest.mark.parametrize("left", range(0, 30, 3))
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_where_host_memory_ends_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, codec: str, left: int) -> None:
    monkeypatch.setitem(bus.BUSES, "cpu", Full)
    model = llama(num_hidden_layers=3)
    ids = prompt(2, 60)["input_ids"]
    kv = f"{codec}+offload+paged+page_size:4"
    with torch.no_grad(), hfkv.patch(model, codec):
        expected = model(ids, past_key_values=KVCache(model, codec)).logits
        cache = KVCache(model, kv)
        Full.left = left
        held, logits, said = 0, [], []
        for last in (10, 17, *range(18, 61)):
            while held < last:
                try:
                    logits.append(model(ids[:, held:last], past_key_values=cache).logits)
                    held = last
                except hfkv.CacheMemoryError as error:
                    said.append(str(error))
                    assert [leaf.get_seq_length() for leaf in error.cache.leaves] == [held] * 3  # noqa: PT017
                    Full.left = 50
    assert said
    assert all("host memory" in text for text in said)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_failed_generate_says_where_its_text_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bus.BUSES, "cpu", Full)
    model, inputs = llama(), prompt(1, 20)
    with hfkv.patch(model, "int8"):
        expected = greedy(model, inputs, 40)
    with hfkv.patch(model, "int8+offload"):
        Full.left = 12
        monkeypatch.setattr("hfkv.stores.offloaded.OffloadedStore.reserve", lambda self, tokens: None)
        with pytest.raises(hfkv.CacheMemoryError, match="host memory") as caught:
            greedy(model, inputs, 40)
        cache = caught.value.cache
        ids = cache.holds_tokens
        assert ids.shape[1] > 20
        assert torch.equal(ids, expected[:, : ids.shape[1]])
        Full.left = 1000
        rest = greedy(
            model, {"input_ids": expected[:, : ids.shape[1] + 1], "past_key_values": cache}, 60 - ids.shape[1] - 1
        )
    assert torch.equal(rest, expected)


def test_a_budget_smaller_than_a_page_is_refused_before_anything_is_held() -> None:
    model = llama()
    kv = KVConfig(offload=True, device_budget=100)
    cache = KVCache(model, kv)
    with hfkv.patch(model), pytest.raises(ValueError, match=r"device_budget is 100 bytes.*at least 2,048 bytes"):
        greedy(model, {**prompt(), "past_key_values": cache})
    assert cache.get_seq_length() == 0
    with hfkv.patch(model, kv), pytest.raises(ValueError, match="device_budget"):
        greedy(model, prompt())


def test_on_a_cpu_of_its_own_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(bus.BUSES, "cpu")
    model = llama()
    with hfkv.patch(model, "int8+offload+device_budget:1B"):
        out = greedy(model, prompt(), return_dict_in_generate=True)
    assert not any(isinstance(leaf.store, OffloadedStore) for leaf in out.past_key_values.leaves)
    with hfkv.patch(model, "int8"):
        assert torch.equal(out.sequences, greedy(model, prompt()))


def test_a_full_disk_leaves_the_cache_and_the_file_before_it(tmp_path: Path) -> None:
    model, inputs, path = llama(), prompt(1, 30), tmp_path / "cache.safetensors"
    with hfkv.patch(model, "offload"):
        out = greedy(model, inputs, 4, return_dict_in_generate=True)
        cache = out.past_key_values
        cache.save(path)
        before = path.read_bytes()
        longer = greedy(model, {"input_ids": out.sequences, "past_key_values": cache}, 80, return_dict_in_generate=True)
        _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, most))
        try:
            with pytest.raises(OSError, match="bytes do not fit") as caught:
                cache.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before
        assert torch.equal(KVCache.load(path, model).holds_tokens, out.sequences[:, :-1])
        more = greedy(model, {"input_ids": longer.sequences, "past_key_values": cache}, 5)
        assert torch.equal(more, greedy(model, inputs, 4 + 80 + 5))
