"""What is planned: the bytes that real caches take, sums that add up, and limits that are limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Gemma3TextConfig, MambaConfig, MistralConfig, PreTrainedModel, T5Config

import hfkv
from hfkv import KVConfig
from hfkv.models.shapes import shape_config
from hfkv.planning import geometry
from hfkv.planning.fit import Fit, Planner, largest_that
from hfkv.planning.footprint import STAGING, Footprint
from hfkv.planning.geometry import Geometry, States
from hfkv.planning.plan import DEVICE_OVERHEAD
from hfkv.planning.speeds import read_speed
from hfkv.stores.offload.bus import BUSES
from hfkv.stores.planes import token_bytes
from tests.tiny import llama, llama_config, prompt
from tests.zoo import NAMED, Architecture, build
from tests.zoo import prompt as prompt_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPEEDS: dict[str, Any] = {"bandwidth": "1TB/s", "bus": "50GB/s"}
CONFIGS = (
    "none",
    "int8",
    "fp8",
    "int4",
    "k:int8+v:int4",
    "none+paged",
    "int4+paged+page_size:16",
    "window:32",
    "int8+window:400+sinks:16",
    "int8+window:32+sinks:0",
    "int4+window:32+paged",
    "window:32+paged+page_size:8",
    "window:32+summary:mean+summary_pages:2+summary_page_size:8",
    "fp8+window:32+global_layers:0",
    "window:32+global_heads:1=0",
    "int4+recent:32:int8",
    "int2+recent:32+recent_sinks:0+paged+page_size:8",
)
# Sliding, hybrid, latent, experts, tied, by position, with a linear attention, and with an encoder.
ZOO = ("mistral", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_next", "gpt2", "bart")


def measured(model: Any, kv: str | KVConfig, inputs: dict[str, Any], new_tokens: int) -> hfkv.KVCache:
    """The cache of a patched generation with a known length."""
    with hfkv.patch(model, kv):
        cache = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            return_dict_in_generate=True,
        ).past_key_values
    return getattr(cache, "self_attention_cache", cache)


def indexed(family: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model whose indexer picks tokens; of glm_moe_dsa's layers, the second shares the first one's."""
    class_name = {"deepseek_v32": "DeepseekV32ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM"}[family]
    model = build(Architecture("causal", family, class_name))
    if family == "glm_moe_dsa":
        model.config.indexer_types = ["full", "shared"]
        model = type(model)(model.config).eval()
    return model, prompt_for(model)


def assert_planned(model: Any, kv: str | KVConfig, cache: hfkv.KVCache, new_tokens: int, batch: int) -> None:
    planner = Planner.of(model.config, model.dtype, CPU, reply=new_tokens - 1)
    planned = planner.footprint(KVConfig.of(kv)).of(cache.get_seq_length(), batch)
    assert planned.allocated == pytest.approx(cache.nbytes(), rel=0.02)
    assert planned.held == pytest.approx(cache.held_bytes(), rel=0.02)
    assert planned.peak >= planned.allocated >= planned.held > 0


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def big() -> Planner:
    return Planner.of(shape_config("llama-8b", None), None, GPU)


@pytest.fixture
def plans_of_llama_8b(big: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that model once, whoever plans it."""
    monkeypatch.setattr(Planner, "of", lambda *_, **__: big)


@pytest.mark.parametrize("kv", CONFIGS)
@pytest.mark.parametrize(("length", "new_tokens", "batch", "padding"), [(9, 60, 2, 4), (70, 30, 3, 0), (90, 2, 1, 0)])
def test_the_plan_is_what_generate_allocates(
    tiny: PreTrainedModel, kv: str, length: int, new_tokens: int, batch: int, padding: int
) -> None:
    cache = measured(tiny, kv, prompt(batch, length, padding), new_tokens)
    assert cache.get_seq_length() == length + new_tokens - 1
    assert_planned(tiny, kv, cache, new_tokens, batch)


@pytest.mark.parametrize("name", [name for name in ZOO if name in NAMED])
@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4"])
def test_the_plan_holds_for_other_architectures(name: str, kv: str) -> None:
    sample = NAMED[name]()
    cache = measured(sample.model, kv, sample.inputs, 20)
    assert_planned(sample.model, kv, cache, 20, 2)


@pytest.mark.parametrize("kv", ["window:6+sinks:2", "int8+window:6+sinks:2+paged+page_size:4"])
def test_the_plan_holds_for_latents_under_a_window(kv: str) -> None:
    sample = NAMED["deepseek_v3"]()
    assert_planned(sample.model, kv, measured(sample.model, kv, sample.inputs, 20), 20, 2)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4", "int8+offload+paged+page_size:4"])
def test_the_plan_counts_the_keys_of_an_indexer(family: str, kv: str) -> None:
    model, inputs = indexed(family)
    with_offload = KVConfig.parse(kv).offload
    cache = measured(model, kv, inputs, 20)
    if not with_offload:
        assert_planned(model, kv, cache, 20, 2)
    footprint = Planner.of(model.config, model.dtype, CPU, reply=19).footprint(KVConfig.parse(kv))
    tokens, batch = cache.get_seq_length(), 2
    # The second layer of glm_moe_dsa attends to what the first has picked.
    keys = batch * tokens * model.config.index_head_dim * 4 * (1 if family == "glm_moe_dsa" else 2)
    assert sum(plane.allocated for layer in cache.kv_layers for plane in layer.extra_memory()) == keys
    if with_offload:
        on_device = footprint.of(tokens, batch).allocated - footprint.offloaded(tokens, batch).allocated
        assert on_device == keys


@pytest.mark.parametrize(
    "kv",
    [
        "none+offload",
        "int8+offload+paged+page_size:8",
        "int8+offload+paged+page_size:8+device_budget:20kB",
        "none+offload+window:32",
    ],
)
@pytest.mark.parametrize(("length", "new_tokens", "batch"), [(9, 60, 2), (70, 30, 3), (90, 2, 1)])
def test_the_plan_of_an_offloaded_cache_is_right_to_a_page_of_each_row(
    tiny: PreTrainedModel, kv: str, length: int, new_tokens: int, batch: int
) -> None:
    cache = measured(tiny, kv, prompt(batch, length), new_tokens)
    planner = Planner.of(tiny.config, tiny.dtype, CPU, reply=new_tokens - 1)
    footprint = planner.footprint(KVConfig.parse(kv))
    tokens = length + new_tokens - 1
    planned = footprint.of(tokens, batch)
    pages = batch * sum(layer.store.page_size * plane_bytes(layer.store) for layer in cache.kv_layers)
    assert cache.offload is not None
    num_bytes = cache.nbytes() - sum(cache.offload.buffer_bytes().values())
    assert abs(planned.allocated - num_bytes) <= 0.02 * num_bytes + pages
    assert planned.held == pytest.approx(cache.held_bytes(), rel=0.02)


def plane_bytes(store: Any) -> int:
    """Bytes of a token of one row."""
    return sum(token_bytes(plane) for plane in store.planes)


def test_overrides_of_single_layers_are_planned(tiny: PreTrainedModel) -> None:
    kv = KVConfig(codec="int4", layers={"0": KVConfig(window=16)})
    assert_planned(tiny, kv, measured(tiny, kv, prompt(2, 40), 10), 10, 2)


@pytest.mark.parametrize("kv", ["none", "int4", "none+paged", "int8+window:4096", "none+offload"])
def test_the_largest_is_the_last_that_fits(big: Planner, kv: str) -> None:
    footprint = big.footprint(KVConfig.parse(kv))
    fit = Fit(big, 18 * 2**30, most_context=None)
    weights = big.weights["bf16"]
    context = fit.largest_context(weights, footprint, 2)
    if context < 1 << 24:  # what a window holds does not grow
        assert fit.holds(weights, footprint, context, 2)
        assert not fit.holds(weights, footprint, context + 1, 2)
    rows = fit.largest_batch(weights, footprint, 8192)
    assert rows > 0
    assert fit.holds(weights, footprint, 8192, rows)
    assert not fit.holds(weights, footprint, 8192, rows + 1)


def test_no_context_is_longer_than_the_models_most(big: Planner) -> None:
    fit = Fit(big, 80 * 2**30, most_context=131_072)
    assert fit.largest_context(big.weights["bf16"], big.footprint(KVConfig()), 1) == 131_072
    fit = Fit(big, 10 * 2**30, most_context=131_072)
    assert fit.largest_context(big.weights["bf16"], big.footprint(KVConfig()), 1) == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 77, 99, 100, 5000])
def test_a_search_finds_the_last_number(limit: int) -> None:
    assert largest_that(lambda number: number <= limit, 100) == min(limit, 100)


def test_a_plan_adds_up(plans_of_llama_8b: None) -> None:
    plan = hfkv.memory_plan("llama-8b", "24GiB", 1000, 3, weights="int8", kv=["none", "int8+offload"], **SPEEDS)
    weights = next(each for each in plan.weights if each.name == "int8")
    plain, offloaded = plan.caches
    token_bytes = 32 * 2 * 8 * 128 * 2  # layers, keys and values, heads, dims, bytes
    assert plain.kv_bytes == plain.device_bytes == plain.read_bytes == 3 * 1000 * token_bytes
    assert plain.total_bytes == weights.nbytes + plain.kv_bytes + plan.activation_bytes
    assert plain.floor_ms == pytest.approx(1e3 * (weights.read(3) + plain.read_bytes) / 1e12)
    assert plan.overhead_bytes == DEVICE_OVERHEAD
    page_bytes = 64 * 32 * 2 * 8 * (128 + 2)
    assert offloaded.host_bytes == offloaded.kv_bytes == 3 * 16 * page_bytes
    assert offloaded.device_bytes == 3 * page_bytes + STAGING
    assert offloaded.floor_ms == pytest.approx(
        max((weights.read(3) + offloaded.read_bytes) / 1e9, offloaded.read_bytes / 50e6)
    )
    # What a step of 3 rows must do at least: as a row of hidden states goes through an MLP.
    assert plan.activation_bytes == 3 * (1000 * (4 * 4096 + 3 * 14_336) * 2 + 2 * 4 * 128_256)


def test_a_budget_on_the_device_stays_there(big: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    footprint = big.footprint(KVConfig(offload=True, device_budget="2GiB"))
    assert footprint.on_device(100_000) == 2 * 2**30 + STAGING
    assert footprint.on_device(1000) == footprint.of(1000).peak  # all of it fits
    monkeypatch.delitem(BUSES, "cpu")  # which these tests give a memory of its own
    here = Footprint(big.geometry, KVConfig(offload=True), CPU)
    assert here.offloaded(1000).allocated == 0
    assert here.on_device(1000) == here.of(1000).allocated


def test_a_prompt_in_chunks_needs_more_than_its_window(big: Planner) -> None:
    footprint = Footprint(big.geometry, KVConfig(window=4096), GPU, reply=1)
    assert footprint.of(100_000).peak > 1.2 * footprint.of(100_000).allocated
    assert footprint.of(100_000).allocated < 1.1 * footprint.of(100_000).held
    assert footprint.of(100_000).held == 32 * 2 * 8 * 128 * 2 * (4096 + 4)


def test_a_batch_is_its_rows(big: Planner) -> None:
    for kv in ("int4", "none+paged"):
        footprint = big.footprint(KVConfig.parse(kv))
        assert footprint.of(777, 5) == footprint.of(777).times(5)


def test_a_loaded_model_is_planned_as_it_is(tiny: PreTrainedModel) -> None:
    plan = hfkv.memory_plan(tiny, "1MiB", 100, **SPEEDS, device="cpu")
    loaded = plan.weights[-1]
    assert plan.chosen == loaded.name == "loaded"
    assert loaded.nbytes == sum(tensor.nbytes for tensor in (*tiny.parameters(), *tiny.buffers()))
    assert plan.dtype == "float32"
    assert plan.weights[0].name == "fp32"
    assert not any(weight.is_meta for weight in tiny.parameters())


def test_usual_caches_that_do_not_fit_a_model_are_left_out() -> None:
    sliding = MistralConfig(**{**llama_config().to_dict(), "model_type": "mistral", "sliding_window": 64})
    plan = hfkv.memory_plan(sliding, "1GiB", 100, **SPEEDS)
    assert [cache.kv for cache in plan.caches] == ["none", "int8", "fp8", "int4", "none+offload"]
    assert any("int8+window:4096+sinks:4 is left out" in note for note in plan.notes)
    with pytest.raises(ValueError, match="slides"):
        hfkv.memory_plan(sliding, "1GiB", 100, kv=["window:32"], **SPEEDS)
    with pytest.raises(ValueError, match="takes no window"):
        hfkv.memory_plan(T5Config(num_layers=2), "1GiB", 100, kv=["window:32"], **SPEEDS)
    with pytest.raises(ValueError, match="layer 0 picks the tokens"):
        hfkv.memory_plan(indexed("deepseek_v32")[0].config, "1GiB", 100, kv=["window:32"], **SPEEDS)


def test_a_sliding_layer_is_planned_as_it_slides() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=512, head_dim=64, num_key_value_heads=1)
    planner = Planner.of(config, torch.bfloat16, CPU)
    token_bytes = 2 * 64 * 2
    held = planner.footprint(KVConfig()).of(10_000).held
    assert held == token_bytes * (10_000 + 5 * 512)


def test_code_that_needs_numbers_is_planned_by_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Geometry.of(llama_config(), torch.bfloat16)

    def fail(*_: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(geometry, "_fill", fail)
    found = Geometry.of(llama_config(), torch.bfloat16)
    assert found.states == known.states
    assert "Tensor.item()" in found.notes[0]
    latent = Geometry.of(DeepseekV3Config(num_hidden_layers=2, vocab_size=99), torch.bfloat16)
    assert latent.states == dict.fromkeys(range(2), States(1, 512, 1, 64, torch.bfloat16))
    with pytest.raises(ValueError, match="does not run without weights"):
        Geometry.of(indexed("deepseek_v32")[0].config, torch.bfloat16)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention heads"):
        hfkv.memory_plan(MambaConfig(num_hidden_layers=2, hidden_size=64), "1GiB", 100, **SPEEDS)
    with pytest.raises(TypeError, match="a model or its config, got list"):
        hfkv.memory_plan([], "1GiB", 100, **SPEEDS)
    for changes, message in (
        ({"context": 0}, "context must be"),
        ({"context": "long"}, "context takes a number of tokens"),
        ({"reply": 101}, "reply must be a part of the context, 100"),
        ({"dtype": torch.float32, "weights": "bf16"}, r"dtype=bfloat16 \(--dtype\)"),
        ({"kv": []}, "kv names no cache"),
        ({"batch": True}, "batch must be"),
        ({"memory": "lots"}, "memory takes a size"),
        ({"weights": "int3"}, "allowed: auto, bf16, int8, int4"),
        ({"bandwidth": "fast"}, "bandwidth takes a speed"),
        ({"device": "toaster"}, "device must be"),
    ):
        with pytest.raises(ValueError, match=message):
            hfkv.memory_plan("tiny", **{"memory": "1GiB", "context": 100, **SPEEDS, **changes})


def test_speeds_are_read() -> None:
    assert read_speed("bus", 4.3e12) == 43 * 10**11
    assert read_speed("bus", "50GB/s") == 50 * 10**9
    assert read_speed("bus", "4.3 TB/s") == 43 * 10**11
    assert read_speed("bus", 7) == 7
