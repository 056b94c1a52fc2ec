"""Caches in files: what is saved comes back bit for bit, goes on alike, and fits no other model."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import hfkv
from hfkv import KVCache, KVConfig, Window
from hfkv.sharing.files import tensor_file
from hfkv.sharing.files.header import kv_from_json, kv_to_json
from tests.tiny import feed, greedy, llama, prompt
from tests.unit.test_cache import PRODUCT

CACHE_SINKS = "int8+window:6+sinks:2+sink_positions:cache"
SUMMARIES = "window:6+sinks:2+summary:mean+summary_pages:3+summary_page_size:2"
DYNAMIC = KVConfig(window=Window(8, 1, schedule="dynamic"))
LAYERS = KVConfig("int8", window=6, layers={"0": KVConfig("int4", store="paged", page_size=4)})
POLICIES: list[KVConfig | str] = [
    *("none", "int8+paged", "int4+offload", "fp8+window:6", CACHE_SINKS, SUMMARIES, f"int4+paged+offload+{SUMMARIES}"),
    *("k:none+v:fp8+window:6", f"k:int8+v:int4+paged+offload+{SUMMARIES}"),
    *("window:6+global_layers:1", "int8+window:6+global_heads:0=1,1=0", "window:4+sinks:0", DYNAMIC, LAYERS),
    *("int4+recent:6:int8+recent_sinks:2", "k:int4+v:int2+recent:6:k:int8/v:none+paged+page_size:4+offload"),
]


def sliding(config_class: type, model_class: type, **changes: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
    model = model_class(config_class(**sizes, **heads, sliding_window=6, **changes)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def used(model: Any, kv: KVConfig | str, length: int = 20, padding: int = 3) -> tuple[KVCache, torch.Tensor]:
    """A cache that a patched model has filled, and the text so far."""
    cache = KVCache(model, kv, model.hfkv.rotary)
    return cache, greedy(model, prompt(length=length, padding=padding), 7, past_key_values=cache)


def go_on(model: Any, cache: KVCache, text: torch.Tensor, padding: int = 3) -> torch.Tensor:
    text = torch.cat([text, torch.tensor([[5, 6, 7], [8, 9, 10]])], dim=1)
    mask = torch.ones_like(text)
    mask[0, :padding] = 0
    return greedy(model, {"input_ids": text, "attention_mask": mask}, past_key_values=cache)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def everything(cache: KVCache) -> list[Any]:
    """All that a cache holds, as values that compare exactly."""
    found: list[Any] = [cache.kv, cache.model_type, len(cache.layers)]
    for leaf in cache.leaves:
        held = leaf.contents()
        assert held is not None
        found += [held.parts, held.seen, held.gone_below, held.pads]
        found += [bits(plane) for plane in (*(held.slots or ()), *held.tokens)]
        found += [bits(states) for states in (leaf.keys, leaf.values)]
    tokens, hidden = cache.holds_tokens, cache.record.hidden()
    return [*found, None if tokens is None else (bits(tokens), None if hidden is None else bits(hidden))]


def text_of(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["hfkv"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.safetensors"


@pytest.mark.parametrize("kv", [*PRODUCT, *POLICIES], ids=str)
def test_a_saved_cache_comes_back_and_goes_on_alike(kv: KVConfig | str, path: Path) -> None:
    model = llama()
    with hfkv.patch(model, kv):
        cache, text = used(model, kv)
        cache.save(path)
        loaded = KVCache.load(str(path), model)
        assert everything(loaded) == everything(cache)
        again = path.with_name("again.safetensors")
        loaded.save(again)
        assert again.read_bytes() == path.read_bytes()
        fork = loaded.fork(2)
        assert fork.batch_size == 4
        cropped, twin = loaded.fork(), cache.fork()
        for each in (cropped, twin):
            each.crop(-1)
        assert everything(cropped) == everything(twin)
        new = go_on(model, cache, text)
        assert torch.equal(go_on(model, loaded, text), new)
        assert everything(loaded) == everything(cache)
        assert len(set(new[1, -12:].tolist())) > 3, "the model repeats itself: nothing is tested"


@pytest.mark.parametrize(("config", "model"), [(MistralConfig, MistralForCausalLM), (Gemma2Config, Gemma2ForCausalLM)])
@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4"])
def test_models_with_windows_of_their_own(config: type, model: type, kv: str, path: Path) -> None:
    sliding_model = sliding(config, model)
    with hfkv.patch(sliding_model, kv):
        cache, text = used(sliding_model, kv)
        assert cache.leaves[0].contents().gone_below > 0
        cache.save(path)
        loaded = KVCache.load(path, sliding_model)
        assert everything(loaded) == everything(cache)
        assert torch.equal(go_on(sliding_model, loaded, text), go_on(sliding_model, cache, text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kv", ["none", "int8", "int4+window:6", "fp8"])
def test_every_dtype(dtype: torch.dtype, kv: str, path: Path) -> None:
    model = llama().to(dtype)
    with hfkv.patch(model, kv):
        cache, text = used(model, kv)
        cache.save(path)
        loaded = KVCache.load(path, model)
        assert everything(loaded) == everything(cache)
        assert torch.equal(go_on(model, loaded, text), go_on(model, cache, text))


def test_a_layer_that_holds_no_token(path: Path) -> None:
    model = llama()
    with hfkv.patch(model, "window:1+sinks:0"):
        cache = KVCache(model, "window:1+sinks:0")
        cache.activate_past_recording()
        model(prompt(length=100)["input_ids"], past_key_values=cache)
        for layer in cache.kv_layers:
            layer.record_past = False
            layer._forget_unseen()
        assert cache.layers[0].contents().tokens[0].shape[2] == 0
        cache.save(path)
        assert everything(KVCache.load(path, model)) == everything(cache)


def test_the_file_is_plain_safetensors_with_planes_as_held(path: Path) -> None:
    model = llama()
    with hfkv.patch(model):
        cache, text = used(model, "int8+window:6+sinks:2")
        cache.save(path)
    tensors = load_file(path)
    held = cache.leaves[1].contents()
    assert bits(tensors["1.tokens.2"]) == bits(held.tokens[2])
    assert bits(tensors["0.slots.3"]) == bits(cache.leaves[0].contents().slots[3])
    assert torch.equal(tensors["ids"], text[:, : held.seen])
    assert torch.equal(tensors["padding"], torch.arange(held.seen).expand(2, -1) < torch.tensor([[3], [0]]))
    path.chmod(0o600)
    cache.save(path)
    assert path.stat().st_mode & 0o777 == 0o600, "what was private stays private"


@pytest.mark.parametrize("kv", ["none", "int8+paged", "window:6+sinks:2"])
def test_a_cache_of_a_model_that_is_not_patched(kv: str, path: Path) -> None:
    model = llama()
    cache = KVCache(model, kv)
    feed(cache, 2, 20)
    with pytest.raises(ValueError, match="was not patched, so nobody knows which; give it"):
        cache.save(path)
    cache.save(path, model)
    loaded = KVCache.load(path, model)
    assert everything(loaded) == everything(cache)
    assert loaded.holds_tokens is None
    assert not loaded.record.is_known
    feed(loaded, 2, 1)
    assert loaded.get_seq_length() == 21


def test_assigned_keys_come_back_without_tokens(path: Path) -> None:
    model = llama()
    with hfkv.patch(model):
        cache, _ = used(model, "none")
        layer = cache.layers[0]
        layer.keys = layer.keys * 2
        cache.save(path)
        loaded = KVCache.load(path, model)
    assert everything(loaded) == everything(cache)
    assert not loaded.record.is_known
    layer.keys, layer.values = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 4, 16)
    with pytest.raises(RuntimeError, match="its layers hold different tokens"):
        cache.save(path)
    layer._assign("key", torch.randn(2, 2, 5, 16))
    with pytest.raises(RuntimeError, match="without the other half"):
        cache.save(path)


@pytest.mark.parametrize(
    "kv", [*POLICIES, "none+window:dynamic", KVConfig(layers={"0-1": KVConfig(window=3)})], ids=str
)
def test_configs_are_json_and_back(kv: KVConfig | str) -> None:
    config = KVConfig.of(kv)
    assert kv_from_json(kv_to_json(config)) == config


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["replace", "fsync", "write"])
def test_a_crash_leaves_the_old_file_whole(
    error: BaseException, where: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    cache = KVCache(model)
    feed(cache, 1, 9)
    cache.save(path, model)
    old, loaded = path.read_bytes(), everything(KVCache.load(path, model))
    feed(cache, 1, 1)

    def crash(*args: object) -> None:
        raise error

    def half(file: Any, *args: Any) -> None:
        file.write(b"half")
        assert len(list(path.parent.iterdir())) == 2
        raise error

    if where == "write":
        monkeypatch.setattr(tensor_file, "_write", half)
    else:
        monkeypatch.setattr(os, where, crash)
    with pytest.raises(type(error)):
        cache.save(path, model)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    assert everything(KVCache.load(path, model)) == loaded
    cache.save(path, model)
    assert everything(KVCache.load(path, model)) == everything(cache) != loaded


def test_links_stay_links(path: Path) -> None:
    model = llama()
    cache = KVCache(model)
    feed(cache, 1, 9)
    link = path.with_name("link")
    link.symlink_to(path)
    cache.save(link, model)
    assert link.is_symlink()
    assert everything(KVCache.load(path, model)) == everything(cache)


def test_files_that_are_none_of_ours(path: Path) -> None:
    model = llama()
    with pytest.raises(FileNotFoundError):
        KVCache.load(path, model)
    with pytest.raises(IsADirectoryError):
        KVCache.load(path.parent, model)
    tensors = {"a": torch.zeros(3)}
    for metadata in (None, {"format": "pt"}, {"hfkv": "{}", "format": "pt"}):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"chat\.safetensors.*holds no hfkv cache"):
            KVCache.load(path, model)
    for text in (
        "",
        "{}",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"format":' * 5000,
        '{"format":"hfkv"}',
        "\ud7ff",
        "1" * 9999,
    ):
        save_file(tensors, path, {"hfkv": text})
        with pytest.raises(ValueError, match=r"chat\.safetensors cannot be loaded: .*Use a whole copy"):
            KVCache.load(path, model)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        KVCache.load(path, model)
    cache = KVCache(model)
    feed(cache, 1, 9)
    cache.save(path, model)
    newer = text_of(path).replace('"version":1', '"version":2')
    save_file(load_file(path), path, {"hfkv": newer})
    with pytest.raises(ValueError, match=r"chat\.safetensors is of version 2 .* reads 1: update hfkv"):
        KVCache.load(path, model)
