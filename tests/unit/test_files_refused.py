"""Caches that no file can hold, and files that need something registered first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig

import hfkv
from hfkv import KVCache, KVConfig, Window
from hfkv.cache.factory import BUILDERS, register_layer
from hfkv.cache.layers.layer import KVLayer
from hfkv.policy.codec_pair import CODEC_WORDS
from hfkv.policy.rules import RULES
from tests.tiny import feed, llama


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.safetensors"


def test_what_cannot_be_saved_says_why(path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="is empty"):
        KVCache(model).save(path, model)
    own = KVCache(model, KVConfig(window=Window(8, schedule=lambda seen: 8)))
    feed(own, 1, 9)
    with pytest.raises(ValueError, match=r"Window\.schedule is a callable of your own"):
        own.save(path, model)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    hybrid = KVCache(Qwen3NextConfig(**sizes, layer_types=["linear_attention", "full_attention"], num_hidden_layers=2))
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        hybrid.save(path, model)
    cache = KVCache(model)
    feed(cache, 1, 9)
    with pytest.raises(TypeError, match="got LlamaConfig"):
        cache.save(path, model.config)
    with pytest.raises(TypeError, match="PathLike"):
        cache.save(3, model)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        cache.save(path / "nowhere" / "chat", model)
    cache.record.broken = "OSError: no more"
    with pytest.raises(RuntimeError, match=r"failed midway \(OSError: no more\)"):
        cache.save(path, model)
    assert not list(path.parent.iterdir())


class Counting(KVLayer):
    """Keeps something that no file holds."""

    extra_name = "counts"

    @property
    def extras(self) -> list[str]:
        return ["counts"]

    def extra_memory(self) -> list[Any]:
        return [("counts", torch.device("cpu"), 8, 8)]


def test_a_layer_that_keeps_more_than_tokens_is_neither_saved_nor_loaded(path: Path) -> None:
    model = llama()
    cache = KVCache(model)
    feed(cache, 1, 9)
    cache.save(path, model)
    whole = path.read_bytes()
    register_layer(lambda place: Counting(place.kv) if place.index else None)
    try:
        with pytest.raises(ValueError, match="keeps counts, which neither files nor shared prefixes hold"):
            hfkv.patch(model, "reuse")
        with pytest.raises(
            NotImplementedError,
            match=r"layer 1 \(Counting\) keeps counts, which neither files nor shared prefixes hold",
        ):
            KVCache.load(path, model)
        cache = KVCache(model)
        feed(cache, 1, 9)
        with pytest.raises(
            NotImplementedError,
            match=r"layer 1 \(Counting\) keeps counts, which neither files nor shared prefixes hold",
        ):
            cache.save(path, model)
    finally:
        BUILDERS.pop(0)
    assert path.read_bytes() == whole


def test_a_codec_or_rule_that_is_not_known_here_is_to_be_registered_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    for kv, known, name in (("int8", CODEC_WORDS, "int8"), ("window:dynamic", RULES, "dynamic")):
        cache = KVCache(model, kv)
        feed(cache, 1, 9)
        cache.save(path, model)
        with monkeypatch.context() as patched:
            if isinstance(known, dict):
                patched.delitem(known, name)
            else:
                patched.setattr("hfkv.sharing.files.header.CODEC_WORDS", ["none"])
            with pytest.raises(ValueError, match=rf"'{name}', which is not registered here; register it first") as told:
                KVCache.load(path, model)
        assert "Use a whole copy" not in str(told.value)
