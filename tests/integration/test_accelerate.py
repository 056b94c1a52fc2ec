"""Models whose weights accelerate has placed: on devices, in host memory, on disk. Every cache follows its layer."""

import copy
import itertools
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.hooks import remove_hook_from_submodules
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
)

import hfkv
from hfkv import KVCache, KVConfig
from tests.tiny import greedy, llama, prompt

NEW_TOKENS = 10
WINDOW, REUSE = "int8+window:8+sinks:2", "paged+page_size:4+reuse"
KVS = [None, "int8", WINDOW, REUSE, "int4+offload", "int4+offload+key_mean:off"]
MIXED = {
    "model.embed_tokens": "cpu",
    "model.layers.0.self_attn": "disk",
    "model.layers.0.mlp": "cpu",
    "model.layers.0.input_layernorm": "cpu",
    "model.layers.0.post_attention_layernorm": "disk",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
SHARED = "none+paged+page_size:8+reuse"


def on_cpu_offload(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk_offload(model, folder):
    return disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))


def dispatched(device_map):
    def dispatch(model, folder):
        return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder / "offload", force_hooks=True)

    return dispatch


def loaded(device_map):
    """`from_pretrained` with a device map; what it is given is saved first, unpatched."""

    def load(model, folder):
        model.save_pretrained(folder / "model")
        return AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=device_map, offload_folder=folder / "offload", dtype=torch.float32
        ).eval()

    return load


def from_checkpoint(model, folder):
    model.save_pretrained(folder / "model")
    with init_empty_weights():
        empty = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    placed = load_checkpoint_and_dispatch(
        empty, folder / "model", device_map=MIXED, offload_folder=folder / "offload", force_hooks=True
    )
    return placed


# Those that place a model that is there already, patched or not.
PLACED = {
    "cpu_offload": on_cpu_offload,
    "disk_offload": on_disk_offload,
    "hooks on a cpu": dispatched({"": "cpu"}),
    "all on disk": dispatched({"model": "disk", "lm_head": "disk"}),
    "mixed": dispatched(MIXED),
}
LOADED = {"auto": loaded("auto"), "a mixed map": loaded(MIXED), "a checkpoint": from_checkpoint}
ON_META = {"cpu_offload", "disk_offload", "all on disk", "mixed", "a mixed map", "a checkpoint"}


def run(model, inputs, **options):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **(kwargs | options))
    return output.sequences, torch.stack(output.logits), output.past_key_values


def check_same(given, expected):
    assert torch.equal(given[0], expected[0])
    torch.testing.assert_close(given[1], expected[1], rtol=0, atol=2e-5)
    assert len({*expected[0][0, -NEW_TOKENS:].tolist()}) > 4, "the model repeats itself: nothing is tested"


def is_offloaded(model):
    return any(weight.device.type == "meta" for weight in model.parameters())


def products(placements, kvs=KVS):
    """Every placement with one `kv`, and a mixed one with all of them, each day; the rest are slow."""
    usual = REUSE if REUSE in kvs else WINDOW
    found = []
    for placement, kv in itertools.product(placements, kvs):
        marks = () if placement == "mixed" or kv == usual else (pytest.mark.slow,)
        found.append(pytest.param(placement, kv, marks=marks, id=f"{placement}-{kv}"))
    return found


@pytest.fixture(scope="module")
def inputs():
    return prompt(2, 23, padding=5)


@pytest.fixture(scope="module")
def expected(inputs):
    """What the model says where it has not been placed, by `kv`."""
    said = {}
    for kv in KVS:
        model = llama()
        stock = run(model, inputs)
        with hfkv.patch(model, kv):
            said[kv] = run(model, inputs)
        if KVConfig.of(kv).is_lossless:
            check_same(said[kv], stock)
        said["stock"] = stock
    return said


@pytest.mark.parametrize(("placement", "kv"), products([*PLACED, *LOADED]))
def test_a_placed_model_is_patched_and_undone(inputs, expected, tmp_path, placement, kv):
    model = (PLACED | LOADED)[placement](llama(), tmp_path)
    assert is_offloaded(model) == (placement in ON_META)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with hfkv.patch(model, kv) as patch:
        assert patch.own_attention is None
        for _ in range(2):  # the second call may find what the first has read
            given = run(model, inputs)
            assert type(given[2]) is KVCache
            check_same(given, expected[kv])
        if "reuse" in str(kv):
            assert patch.reuse_stats().hits >= 2
        devices = {row.device.type for row in given[2].memory().rows}
        assert devices == {"cpu"}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(values) for name, values in before.items()
    }
    assert model.config._attn_implementation == "sdpa"
    after = run(model, inputs)
    assert type(after[2]) is DynamicCache
    check_same(after, expected["stock"])


@pytest.mark.parametrize(("placement", "kv"), products(PLACED))
def test_a_patched_model_is_placed_and_undone(inputs, expected, tmp_path, placement, kv):
    model = llama()
    patch = hfkv.patch(model, kv)
    run(model, inputs)
    model = PLACED[placement](model, tmp_path)
    for _ in range(2):
        check_same(run(model, inputs), expected[kv])
    patch.undo()
    assert model.config._attn_implementation == "sdpa"
    check_same(run(model, inputs), expected["stock"])
    # And once more: what is left of the first patch inside accelerate's hooks must not count tokens twice.
    with hfkv.patch(model, kv) as patch:
        cache = patch.new_cache()
        tokens = run(model, inputs, past_key_values=cache)[0]
        assert torch.equal(cache.holds_tokens, tokens[:, :-1])
        for _ in range(2):
            check_same(run(model, inputs), expected[kv])
        if "reuse" in str(kv):
            assert patch.reuse_stats().hits >= 2
    check_same(run(model, inputs), expected["stock"])


@pytest.mark.parametrize("kv", [WINDOW, REUSE])
@pytest.mark.parametrize("change", ["hooks come off", "dispatched anew"])
@pytest.mark.parametrize("first", ["patch", "hooks"])
def test_a_patched_model_stays_patched_when_its_hooks_change(inputs, expected, tmp_path, first, change, kv):
    place = dispatched({"": "cpu"})
    model = llama() if first == "patch" else place(llama(), tmp_path)
    patch = hfkv.patch(model, kv)
    if first == "patch":
        model = place(model, tmp_path)
    if change == "hooks come off":
        remove_hook_from_submodules(model)
        assert not hasattr(model, "_hf_hook")
    else:
        model = place(model, tmp_path)
    cache = patch.new_cache()
    given = run(model, inputs, past_key_values=cache)
    check_same(given, expected[kv])
    assert torch.equal(cache.holds_tokens, given[0][:, :-1])
    patch.undo()
    # What accelerate leaves on an instance may stay; nothing of ours may.
    names = ("forward", "_old_forward")
    left = [vars(module).get(name) for module in model.modules() for name in names]
    assert not [forward for forward in left if "hfkv" in repr(forward)]
    check_same(run(model, inputs), expected["stock"])


@pytest.mark.parametrize(
    ("placement", "kv"), products([*PLACED, *LOADED], [kv for kv in KVS if kv not in (REUSE, "int4+offload")])
)
def test_a_cache_of_ones_own_on_a_placed_model(inputs, expected, tmp_path, placement, kv):
    model = (PLACED | LOADED)[placement](llama(), tmp_path)
    model.set_attn_implementation("hfkv")
    cache = KVCache(model, kv)
    given = run(model, inputs, past_key_values=cache)
    assert given[2] is cache
    check_same(given, expected[kv])
    twin = cache.fork()
    longer = {"input_ids": torch.cat((given[0], given[0][:, :3]), dim=1)}
    longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS + 3), value=1)
    assert torch.equal(run(model, longer, past_key_values=cache)[0], run(model, longer, past_key_values=twin)[0])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}], ids=str
)
@pytest.mark.parametrize(("placement", "kv"), products(["cpu_offload", "mixed"], [WINDOW, REUSE]))
def test_other_ways_to_generate_on_a_placed_model(tmp_path, placement, kv, options):
    if placement == "cpu_offload" and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers itself sends candidates to the meta device")
    inputs = prompt(1, 23)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    model = llama()
    with hfkv.patch(model, kv):
        expected = model.generate(**inputs, **options)
    model = PLACED[placement](model, tmp_path)
    with hfkv.patch(model, kv):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("put_away", [accelerate.cpu_offload, accelerate.disk_offload])
def test_weights_that_accelerate_has_put_away_share_prefixes_and_save_caches(put_away: Any, tmp_path: Path) -> None:
    model, inputs = llama(), prompt(1, 40)
    expected = greedy(model, inputs)
    if put_away is accelerate.disk_offload:
        put_away(model, offload_dir=str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    else:
        put_away(model, execution_device=torch.device("cpu"))
    with hfkv.patch(model, SHARED) as patch:
        for _ in range(2):
            assert torch.equal(greedy(model, inputs), expected)
        assert patch.reuse_stats().hits == 1
        cache = patch.new_cache()
        text = {"input_ids": greedy(model, inputs, past_key_values=cache)}
        cache.save(tmp_path / "cache.safetensors")
        more = greedy(model, text)
        for used in (cache, hfkv.KVCache.load(tmp_path / "cache.safetensors", model)):
            assert torch.equal(greedy(model, text, past_key_values=used), more)


def test_what_accelerate_has_wrapped_since_stays_wrapped() -> None:
    model, inputs = llama(), prompt(1, 20)
    expected = greedy(model, inputs)
    patch = hfkv.patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(greedy(model, inputs), expected)
    patch.undo()
    assert torch.equal(greedy(model, inputs), expected)
    cache = hfkv.KVCache(model)
    assert torch.equal(greedy(model, inputs, past_key_values=cache), expected)
    assert cache.holds_tokens is None
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(greedy(model, inputs), expected)
    with hfkv.patch(model):
        assert torch.equal(greedy(model, inputs), expected)
