"""On a GPU: the same tokens, pinned host memory, and only one layer at a time on the device."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import hfkv
from hfkv.stores.offload import staging
from tests.tiny import greedy, llama, llama_config, prompt
from tests.zoo import NAMED, generate

pytestmark = pytest.mark.gpu

LOSSLESS = ("none", "paged+page_size:4", "offload", "offload+paged+page_size:4")


@pytest.mark.parametrize("name", NAMED)
def test_lossless_caches_give_the_tokens_of_dynamic_cache(name: str) -> None:
    sample = NAMED[name]()
    model = sample.model.cuda()
    inputs = {key: value.cuda() for key, value in sample.inputs.items()}
    expected, _ = generate(model, inputs)
    for kv in LOSSLESS:
        with hfkv.patch(model, kv):
            assert torch.equal(generate(model, inputs)[0], expected), kv


@pytest.mark.parametrize("kv", ["int8", "int4", "fp8", "window:8+sinks:2", "int8+window:8+sinks:2+offload+paged"])
def test_lossy_caches_give_the_tokens_of_the_cpu(kv: str) -> None:
    model, inputs = llama(), prompt()
    with hfkv.patch(model, kv):
        expected = greedy(model, inputs)
        model.cuda()
        on_gpu = greedy(model, {key: value.cuda() for key, value in inputs.items()})
    assert torch.equal(on_gpu.cpu(), expected)


WINDOWS = (
    "window:8+sinks:2",
    "window:8+sinks:2+sink_positions:cache",
    "window:8+sinks:2+global_heads:1=0",
    "window:8+sinks:2+summary:mean+summary_pages:3+summary_page_size:4",
    "int8+window:8+sinks:2+sink_positions:cache+paged+page_size:4+offload",
    "int4+recent:8:int8+recent_sinks:2",
)


@pytest.mark.parametrize("kv", WINDOWS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_windows_over_ragged_padding_give_the_tokens_of_the_cpu(kv: str, options: dict[str, int]) -> None:
    model, inputs = llama(), prompt(length=30, padding=13)
    with hfkv.patch(model, kv):
        expected = greedy(model, inputs, 30, **options)
        model.cuda()
        on_gpu = greedy(model, {key: value.cuda() for key, value in inputs.items()}, 30, **options)
    assert torch.equal(on_gpu.cpu(), expected)


def test_a_windowed_prefill_takes_memory_in_proportion_to_the_text() -> None:
    model = llama(max_position_embeddings=100_000).cuda()
    kv = "window:512+sinks:4"
    peaks = []
    for length in (16_000, 64_000):
        ids = torch.randint(3, 99, (2, length), device="cuda")
        mask = torch.ones_like(ids)
        mask[0, :100] = 0
        with torch.no_grad(), hfkv.patch(model, kv):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids, attention_mask=mask, past_key_values=hfkv.KVCache(model, kv), logits_to_keep=1)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4.4 * peaks[0]


@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:16"])
@pytest.mark.parametrize("budget", ["", "+device_budget:64kB"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_offloaded_gives_the_tokens_of_resident_from_pinned_memory(codec: str, budget: str, store: str) -> None:
    model = llama().cuda()
    inputs = {key: value.cuda() for key, value in prompt(2, 300, padding=7).items()}
    with hfkv.patch(model, f"{codec}+{store}"):
        expected = greedy(model, inputs, 80)
    with hfkv.patch(model, f"{codec}+{store}+offload{budget}"):
        out = greedy(model, inputs, 80, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    for leaf in out.past_key_values.leaves:
        away = [segment for plane in leaf.store.tiers.host.planes() for segment in plane]
        assert away
        assert all(segment.is_pinned() for segment in away)
        assert all(plane.is_cuda for plane in leaf.store.read())


def test_offloaded_caches_of_several_threads_and_forks_share_one_bus() -> None:
    model = llama().cuda()
    prompts = [{key: value.cuda() for key, value in prompt(1, 200 + 40 * i).items()} for i in range(4)]
    with hfkv.patch(model, "int8+paged+page_size:8"):
        expected = [greedy(model, inputs, 60) for inputs in prompts]
    with hfkv.patch(model, "int8+offload+paged+page_size:8"), ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            given = list(pool.map(lambda inputs: greedy(model, inputs, 60), prompts))
            assert all(torch.equal(ours, wanted) for ours, wanted in zip(given, expected, strict=True))


def test_device_memory_stays_within_the_budget_and_the_buffers() -> None:
    config = llama_config(num_hidden_layers=8, num_key_value_heads=8, head_dim=128)
    budget, size, layers = 64 << 20, 64, 8
    cache = hfkv.KVCache(config, f"offload+paged+page_size:{size}+device_budget:{budget}B")
    cache.reserve(20_000)
    page = size * 8 * 128 * 2 * 2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for count in [64] * 300 + [1] * 40:
        for index in range(layers):
            states = torch.randn(2, 1, 8, count, 128, device="cuda", dtype=torch.bfloat16)
            cache.update(*states, index)
            for run in cache.layers[index].store.runs(cache.layers[index].store.length):
                run.planes[0].sum()
    torch.cuda.synchronize()
    buffers = staging.BUFFERS * staging.BUFFER_BYTES
    peak = torch.cuda.max_memory_allocated() - before
    assert sum(row.held_bytes for row in cache.memory().rows if row.device.type == "cpu") > budget
    assert peak <= budget + layers * page + buffers


def test_an_offloaded_cache_takes_one_layer_of_device_memory() -> None:
    model = llama(num_hidden_layers=8, head_dim=128, max_position_embeddings=20_000).cuda()
    ids = torch.randint(3, 99, (4, 16_000), device="cuda")
    peaks = {}
    for kv in ("none", "offload"):
        with hfkv.patch(model, kv):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            cache = model.generate(ids, max_new_tokens=4, prefill_chunk_size=500, return_dict_in_generate=True)
            peaks[kv] = torch.cuda.max_memory_allocated() - before
            held = cache.past_key_values.held_bytes()
            del cache
    # Seven of eight layers are elsewhere, and the others come through the buffers.
    assert peaks["none"] - peaks["offload"] >= held * 6 / 8 - staging.BUFFERS * staging.BUFFER_BYTES


@pytest.mark.parametrize("kv", ["none+paged+page_size:8+reuse", "int8+reuse", "int8+offload+paged+page_size:8+reuse"])
def test_sharing_gives_the_tokens_of_a_cold_run(kv: str, tmp_path: Path) -> None:
    model = llama().cuda()
    inputs = {name: value.cuda() for name, value in prompt(1, 90).items()}
    with hfkv.patch(model, kv.replace("+reuse", "")):
        expected, beams = greedy(model, inputs), greedy(model, inputs, num_beams=3)
    with hfkv.patch(model, kv) as patch:
        for _ in range(2):
            assert torch.equal(greedy(model, inputs), expected)
            assert torch.equal(greedy(model, inputs, num_beams=3), beams)
        assert patch.reuse_stats().hits == 3
        cache = patch.new_cache()
        text = greedy(model, inputs, past_key_values=cache)
        more = greedy(model, {"input_ids": text})
        cache.save(tmp_path / "cache.safetensors")
        loaded = hfkv.KVCache.load(tmp_path / "cache.safetensors", model)
        for used in (cache.fork(), loaded):
            assert torch.equal(greedy(model, {"input_ids": text}, past_key_values=used), more)
