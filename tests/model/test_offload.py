"""Offloaded caches: the tokens of resident ones, what stays on the device, and what goes over the bus."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import hfkv
from hfkv import KVCache
from hfkv.measure.allocated import storage_bytes
from hfkv.stores import OffloadedStore
from hfkv.stores.offload import staging
from hfkv.stores.offload.bus import Bus, bus_to
from hfkv.stores.planes import token_bytes
from tests.tiny import greedy, llama, llama_config, prompt
from tests.zoo import NAMED

CODECS = ("none", "int8", "int4", "fp8")
WINDOWS = (
    "",
    "+window:11+sinks:3",
    "+window:11+sinks:2+sink_positions:cache",
    "+window:12+summary:mean+summary_page_size:4",
)
STORES = ("", "+contiguous", "+paged+page_size:4")
BUDGETS = (0, 3)  # kB a layer; 0 for none
HYBRID = ("gemma3", "gemma2", "gpt_oss", "qwen3_next", "jamba", "mistral", "llama4", "deepseek_v3", "t5")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts in several pages, and buffers of a few of them."""
    monkeypatch.setattr("hfkv.stores.CPU_PAGE_SIZE", 4)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 3000)


def model_for(kv: str) -> LlamaForCausalLM:
    """Of one layer where `kv` is lossy: its keys come from the embeddings, the same to the last bit wherever they lie.

    What a second layer writes comes from sums over runs of tokens, in another order, and a last bit may choose another
    code.
    """
    return llama(num_hidden_layers=2 if kv.startswith("none") else 1)


def offload_of(model: LlamaForCausalLM, budget: int) -> str:
    return f"+offload+device_budget:{budget * model.config.num_hidden_layers}kB" if budget else "+offload"


def stores(cache: KVCache) -> list[OffloadedStore]:
    found = [leaf.store for leaf in cache.leaves if leaf.is_initialized]
    assert all(isinstance(store, OffloadedStore) for store in found)
    return found  # type: ignore[return-value]


def device_bytes(cache: KVCache) -> int:
    return sum(storage_bytes(store.planes) for store in stores(cache))


def host_tokens(store: OffloadedStore) -> int:
    """Tokens of pages in host memory, shared ones once."""
    spans = {page: high - low for row in store.table for page, (low, high) in zip(row, store.columns, strict=True)}
    return sum(count for page, count in spans.items() if store.tiers.slot(page) < 0)


def bus() -> Bus:
    return bus_to(torch.device("cpu"))


@pytest.mark.pairwise
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("codec", CODECS)
def test_offloaded_gives_the_tokens_of_resident_in_two_calls(codec: str, window: str, store: str, budget: int) -> None:
    model, inputs = model_for(codec), prompt(2, 30, padding=5)
    outcomes = []
    for offload in ("", offload_of(model, budget)):
        with hfkv.patch(model, codec + window + store + offload):
            first = greedy(model, inputs, 20, return_dict_in_generate=True, output_logits=True)
            assert bool(offload) == bool(bus().bytes_to_device)
            more = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(3))
            ids = torch.cat((first.sequences, more), dim=1)
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            again = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
            second = greedy(model, again, 20, return_dict_in_generate=True, output_logits=True)
        outcomes.append((second.sequences, torch.stack((*first.logits, *second.logits))))
    (tokens, logits), (offloaded, its_logits) = outcomes
    assert torch.equal(tokens, offloaded)
    torch.testing.assert_close(its_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv", ["none+offload", "none+offload+device_budget:6kB", "none+offload+paged+page_size:2"])
@pytest.mark.parametrize("name", [name for name in HYBRID if name in NAMED])
def test_hybrid_models_give_the_tokens_of_dynamic_cache_in_two_calls(name: str, kv: str) -> None:
    sample = NAMED[name]()
    model, inputs = sample.model, sample.inputs
    if name == "gemma2":  # the sdpa attention of transformers 5.17 drops its softcap without a word
        model.set_attn_implementation("eager")
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    stock = model.generate(**inputs, **options)
    ids = torch.cat((stock, stock[:, -3:]), dim=1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
    again = {**inputs, "input_ids": ids, "attention_mask": mask}
    expected = None if model.config.is_encoder_decoder else model.generate(**again, **options)
    with hfkv.patch(model, kv):
        ours = model.generate(**inputs, **options, return_dict_in_generate=True)
        assert torch.equal(ours.sequences, stock)
        assert bus().bytes_to_device > 0
        if expected is not None:
            assert torch.equal(model.generate(**again, **options, past_key_values=ours.past_key_values), expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv", ["none", "int8", "int8+window:11+sinks:3"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_offloaded_gives_the_tokens_of_resident_in_every_mode(kv: str, budget: int, mode: dict[str, Any]) -> None:
    model, inputs = model_for(kv), prompt(1, 33)
    outcomes = []
    for offload in ("", offload_of(model, budget)):
        torch.manual_seed(5)
        with hfkv.patch(model, kv + offload):
            outcomes.append(model.generate(**inputs, max_new_tokens=24, **mode))
    assert torch.equal(*outcomes)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from([*CODECS, "k:int8+v:int4"]),
    window=st.sampled_from(["", "+window:9+sinks:2"]),
    page_size=st.sampled_from([1, 2, 8]),
    batch=st.integers(1, 3),
    budget=st.integers(2_000, 40_000),
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    known=st.booleans(),
)
def test_device_bytes_stay_within_the_budget(
    codec: str, window: str, page_size: int, batch: int, budget: int, steps: list[int], known: bool
) -> None:
    config = llama_config(num_hidden_layers=3)
    budget = max(budget, 3 * 2 * page_size * 2 * 16 * 4)  # a page of every layer
    kv = f"{codec}{window}+offload+paged+page_size:{page_size}+device_budget:{budget}B"
    cache = KVCache(config, kv)
    plain = KVCache(config, kv.partition("+offload")[0] + f"+paged+page_size:{page_size}")
    if known:
        cache.reserve(sum(steps))
    generator = torch.Generator().manual_seed(0)
    for count in steps:
        for index in range(3):
            keys, values = torch.randn(2, batch, 2, count, 16, generator=generator)
            cache.update(keys, values, index)
            plain.update(keys, values, index)
            assert device_bytes(cache) <= budget
        for ours, theirs in zip(stores(cache), plain.leaves, strict=True):
            parts = [(run.layout.read(run.planes, 0, run.layout.length)) for run in ours.runs(ours.length)]
            for index, plane in enumerate(theirs.store.read()):
                held = torch.cat([part[index] for part in parts], dim=2)
                assert torch.equal(held.view(torch.uint8), plane.contiguous().view(torch.uint8))
            page = page_size * sum(map(token_bytes, ours.planes))
            assert cache.offload is not None
            assert sum(cache.offload.buffer_bytes().values()) <= 3 * max(3000, batch * page + 256 * len(ours.planes))
            # As many pages as fit stay: where some are elsewhere there is room for those to be filled next, no more.
            if host_tokens(ours) and not window:
                assert (ours.tiers.most or 0) - len(ours.planes[0]) + len(ours.tiers.device.free) < 2 * batch


@pytest.mark.parametrize("budget", ["", "+device_budget:20kB"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_step_moves_new_tokens_to_the_host_and_each_page_that_is_there_to_the_device(codec: str, budget: str) -> None:
    model = llama(num_hidden_layers=3)
    size = 4
    cache = KVCache(model.config, f"{codec}+offload+paged+page_size:{size}{budget}")
    ids = prompt(2, 61)["input_ids"]
    steps = 2 * size + 1
    with torch.no_grad(), hfkv.patch(model, codec):
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # from here on what the next step needs is on its way
        each = [sum(map(token_bytes, store.planes)) for store in stores(cache)]
        sent = sum(host_tokens(store) * bytes_ for store, bytes_ in zip(stores(cache), each, strict=True))
        assert bus().bytes_to_host == sent
        for _ in range(steps):
            before = bus().bytes_to_device
            away = [host_tokens(store) for store in stores(cache)]
            model(ids[:, :1], past_key_values=cache)
            now = [host_tokens(store) for store in stores(cache)]
            assert all(new - old in (0, size, 2 * size) for new, old in zip(now, away, strict=True))
            sent += sum((new - old) * bytes_ for new, old, bytes_ in zip(now, away, each, strict=True))
            assert bus().bytes_to_host == sent
            moved = bus().bytes_to_device - before
            needed = sum(count * bytes_ for count, bytes_ in zip(now, each, strict=True))
            grown = sum((new - old) * bytes_ for new, old, bytes_ in zip(now, away, each, strict=True))
            # What is brought ahead for the next step is what this one found there, and new pages among it.
            assert needed - grown <= moved <= needed + grown
    assert sum(now) > 0


def test_nothing_moves_while_the_budget_is_enough() -> None:
    model = model_for("int8")
    with hfkv.patch(model, "int8+offload+device_budget:1MiB") as patch:
        out = greedy(model, prompt(2, 30), 20, return_dict_in_generate=True)
        assert patch.kv.device_budget == 1 << 20
    assert (bus().bytes_to_host, bus().bytes_to_device) == (0, 0)
    assert all(host_tokens(store) == 0 for store in stores(out.past_key_values))
    with hfkv.patch(model, "int8"):
        assert torch.equal(out.sequences, greedy(model, prompt(2, 30), 20))


def test_under_a_window_what_fits_is_what_stays() -> None:
    """Sinks and newest tokens are on the device, and a long text moves nothing once the window has filled."""
    model = llama()
    with hfkv.patch(model, "window:12+sinks:2+offload+paged+page_size:2+device_budget:16kB"):
        out = greedy(model, prompt(1, 40), 60, return_dict_in_generate=True)
    made = bus()
    assert all(store.tiers.slot(page) >= 0 for store in stores(out.past_key_values) for page in store.table[0])
    assert made.bytes_to_host < 40 * 2 * sum(map(token_bytes, stores(out.past_key_values)[0].planes))


def test_the_buffers_count_as_memory_of_the_cache() -> None:
    with hfkv.patch(llama(), "offload") as patch:
        cache = greedy(patch.model, prompt(1, 30), return_dict_in_generate=True).past_key_values
    (buffers,) = [row for row in cache.memory().rows if row.layer is None]
    assert (buffers.plane, buffers.held_bytes) == ("staging buffers", 0)
    assert 0 < buffers.allocated_bytes <= 3 * 3000
    assert (
        cache.memory().allocated_bytes
        == cache.nbytes()
        == buffers.allocated_bytes + sum(leaf.nbytes() for leaf in cache.leaves)
    )


def test_the_next_layer_is_on_its_way_while_one_is_read() -> None:
    cache = KVCache(llama_config(num_hidden_layers=3), "offload+paged+page_size:4")
    for index in range(3):
        cache.update(*torch.randn(2, 1, 2, 18, 16), index)
    first, second, _ = stores(cache)
    runs = first.runs(first.length)
    next(runs)
    assert any(buffer.of is not None and buffer.of() is second.tiers for buffer in first.staging.buffers)
    before = bus().bytes_to_device
    runs.close()
    list(second.runs(second.length))
    assert all(
        buffer.of is None or buffer.of() is not second.tiers or buffer.is_read for buffer in second.staging.buffers
    )
    assert bus().bytes_to_device - before <= 2 * 16 * sum(map(token_bytes, second.planes))


@pytest.mark.parametrize("make", [lambda cache: cache.fork(2), copy.deepcopy])
def test_forks_go_on_apart_through_buffers_of_their_own(make: Any) -> None:
    model, inputs = llama(), prompt(1, 40)
    expected = greedy(model, inputs, 13)
    with hfkv.patch(model, "offload"):
        out = greedy(model, inputs, 1, return_dict_in_generate=True)
        forked = make(out.past_key_values)
        rows = forked.batch_size
        mask = torch.ones_like(out.sequences)
        again = {"input_ids": out.sequences.repeat(rows, 1), "attention_mask": mask.repeat(rows, 1)}
        again["past_key_values"] = forked
        assert torch.equal(greedy(model, again, 12), expected.repeat(rows, 1))
        again = {"input_ids": out.sequences, "attention_mask": mask, "past_key_values": out.past_key_values}
        assert torch.equal(greedy(model, again, 12), expected)
    assert forked.offload is not out.past_key_values.offload
