"""Where memory ends: what an offloaded cache says, and what is left."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hfkv
from hfkv import KVCache, KVConfig
from hfkv.stores import OffloadedStore
from hfkv.stores.offload import bus, staging
from tests.lazy_bus import LazyBus
from tests.tiny import greedy, llama, llama_config, llama_for, prompt
from tests.zoo import NAMED


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
    ids = prompt(2, 40)["input_ids"]
    kv = f"{codec}+offload+paged+page_size:4"

    def read(left: int) -> tuple[torch.Tensor, KVCache, list[str]]:
        """Logits `[2, 40, vocab]` where memory is full after `left` allocations, once; and what was said."""
        cache, held, logits, said = KVCache(model, kv), 0, [], []
        Full.left = left
        for last in (10, 17, *range(18, 41)):
            while held < last:
                try:
                    logits.append(model(ids[:, held:last], past_key_values=cache).logits)
                    held = last
                except hfkv.CacheMemoryError as error:
                    said.append(str(error))
                    assert [leaf.get_seq_length() for leaf in error.cache.leaves] == [held] * 3  # noqa: PT017
                    Full.left = 1000
        return torch.cat(logits, dim=1), cache, said

    with torch.no_grad(), hfkv.patch(model, codec):
        logits, cache, said = read(left)
        # The same forwards, whose keys are the same to the last bit on every processor.
        expected, twin, nothing = read(1000)
    assert said
    assert not nothing
    assert all("host memory" in text for text in said)
    assert torch.equal(logits, expected)
    for ours, theirs in zip(cache.leaves, twin.leaves, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


class Short(TorchDispatchMode):
    """Device memory that is full at the nth allocation."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.name() for word in ("empty", "zeros", "clone", "::cat", "index", "_to_copy", "::mul")):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("Tried to allocate")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", ["", "+device_budget:12kB"])
@pytest.mark.parametrize("codec", ["none", "int8", "fp8"])
def test_where_device_memory_ends_nothing_is_lost(codec: str, budget: str) -> None:
    for nth in range(1, 100):
        cache = KVCache(llama_config(), f"{codec}+offload{budget}")
        twin = KVCache(llama_config(), f"{codec}+paged+page_size:4")
        generator = torch.Generator().manual_seed(0)
        for count in (14, 23):
            states = [torch.randn(2, 2, 2, count, 16, generator=generator) for _ in range(2)]
            failed = False
            if count == 23:
                cache.update(*states[0], 0)
                try:
                    with Short(nth):
                        cache.update(*states[1], 1)
                except hfkv.CacheMemoryError:
                    failed = True
                    assert [(leaf.get_seq_length(), leaf.store.length) for leaf in cache.leaves] == [(14, 14)] * 2
            if count == 14 or failed:
                for index in range(2):
                    cache.update(*states[index], index)
            for index in range(2):
                twin.update(*states[index], index)
        for ours, theirs in zip(cache.leaves, twin.leaves, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        if not failed:
            assert nth > 5
            return
    raise AssertionError("it never came to an end")


def test_where_there_is_no_memory_for_buffers_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(num_hidden_layers=3), prompt(2, 60)["input_ids"]
    with torch.no_grad(), hfkv.patch(model, "int8"):
        cache, twin = (KVCache(model, "int8+offload") for _ in range(2))

        def full(*args: Any) -> torch.Tensor:
            raise MemoryError("no more")

        with monkeypatch.context() as patched:
            patched.setattr(staging, "allocate", full)
            for _ in range(5):
                with pytest.raises(hfkv.CacheMemoryError):
                    model(ids[:, :30], past_key_values=cache)
                assert [leaf.get_seq_length() for leaf in cache.leaves] == [0, 0, 0]
        for part in ids.split(30, dim=1):
            logits, expected = (model(part, past_key_values=each).logits for each in (cache, twin))
            assert torch.equal(logits, expected)


def test_a_hybrid_that_ran_out_of_memory_midway_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bus.BUSES, "cpu", Full)
    model = NAMED["qwen3_next"]().model
    ids = torch.randint(3, 50, (1, 20))
    with torch.no_grad():
        cache = KVCache(model, "offload")
        model(ids[:, :3], past_key_values=cache)
        Full.left = 0
        with pytest.raises(MemoryError):
            model(ids[:, 3:], past_key_values=cache)
        Full.left = 1000
        with pytest.raises(RuntimeError, match="failed midway"):
            model(ids[:, 3:], past_key_values=cache)


def test_a_budget_is_divided_anew_when_a_text_goes_on() -> None:
    model = llama()
    with hfkv.patch(model, "offload+device_budget:1MB"):
        first = greedy(model, prompt(1, 20), 4, return_dict_in_generate=True)
        bus.bus_to(torch.device("cpu")).bytes_to_device = 0
        ids = torch.cat((first.sequences, first.sequences), dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        out = greedy(model, given, 100, return_dict_in_generate=True)
    assert bus.bus_to(torch.device("cpu")).bytes_to_device == 0
    assert out.past_key_values.nbytes() <= 1_000_000
    for leaf in out.past_key_values.leaves:
        assert all(leaf.store.tiers.slot(page) >= 0 for page in leaf.store.table[0])


def test_what_is_sent_is_not_the_caller_s_own() -> None:
    cache = KVCache(llama_config(num_key_value_heads=1), "offload+paged+page_size:4")
    keys, values = torch.randn(2, 1, 1, 12, 16)
    given = keys.clone(), values.clone()
    cache.update(*given, 0)
    for states in given:
        states.zero_()
    cache.update(*torch.randn(2, 1, 1, 1, 16), 0)
    assert torch.equal(cache.layers[0].keys[:, :, :12], keys)
    assert torch.equal(cache.layers[0].values[:, :, :12], values)


@pytest.mark.parametrize("budget", ["", "+device_budget:20kB"])
def test_forks_in_threads_give_what_each_gives_alone(budget: str) -> None:
    model, inputs = llama(), prompt(1, 60)
    with hfkv.patch(model, f"offload{budget}"):
        cache = greedy(model, inputs, 1, return_dict_in_generate=True).past_key_values
        ids = inputs["input_ids"]
        given = [torch.cat((ids, torch.full((1, 1), 10 + i)), dim=1) for i in range(4)]
        expected = [greedy(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}, 30) for row in given]
        forks = [cache.fork() for _ in given]

        def run(row: torch.Tensor, fork: KVCache) -> torch.Tensor:
            return greedy(
                model, {"input_ids": row, "attention_mask": torch.ones_like(row), "past_key_values": fork}, 30
            )

        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(run, given, forks))
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(done, expected, strict=True))


def test_a_failed_generate_says_where_its_text_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bus.BUSES, "cpu", Full)
    model, inputs = llama_for("int8"), prompt(1, 20)
    with hfkv.patch(model, "int8"):
        expected = greedy(model, inputs, 40)
    with hfkv.patch(model, "int8+offload"):
        Full.left = 12
        monkeypatch.setattr("hfkv.stores.offload.store.OffloadedStore.reserve", lambda self, tokens: None)
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
    model = llama_for("int8")
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
