"""Saved caches and the model they are loaded for: other models, adapters and weights are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import hfkv
from hfkv import KVCache
from tests.tiny import llama, prompt
from tests.unit.test_files import everything, go_on, sliding, used

peft = pytest.importorskip("peft")
# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.safetensors"


def refused(path: Path, model: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"chat\.safetensors was filled by {words}"):
        KVCache.load(path, model)


def saved(model: Any, path: Path, kv: str = "none") -> tuple[KVCache, torch.Tensor]:
    with hfkv.patch(model, kv):
        cache, text = used(hfkv.models.probe.base_model(model), kv)
        cache.save(path)
    return cache, text


def test_another_model_is_refused(path: Path) -> None:
    saved(llama(), path)
    refused(path, llama(num_hidden_layers=3), "another model: LlamaForCausalLM")
    refused(path, llama(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "another model")
    refused(path, sliding(MistralConfig, MistralForCausalLM), "another model: LlamaForCausalLM .* and not Mistral")
    refused(path, llama().to(torch.bfloat16), "another precision: float32 and not bfloat16")
    with pytest.raises(TypeError, match="got LlamaConfig"):
        KVCache.load(path, llama().config)
    assert KVCache.load(path, llama()).get_seq_length()


def test_other_weights_are_refused(path: Path) -> None:
    model = llama()
    cache, _ = saved(model, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = prompt()["input_ids"]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    refused(path, model, "other weights")
    with pytest.raises(ValueError, match="this cache was filled by other weights; give the model as it was then"):
        cache.save(path, model)
    cache.save(path)
    assert everything(KVCache.load(path, llama())) == everything(cache)


def test_another_precision_is_refused(path: Path) -> None:
    saved(llama(), path)
    with torch.autocast("cpu", torch.bfloat16):
        refused(path, llama(), "another precision: float32 and not float32 under autocast to bfloat16")
    model = llama()
    with hfkv.patch(model, exact_rotary=True):
        refused(path, model, "another precision: float32 and not float32, exact rotary angles")
        used(model, "none")[0].save(path, model)
        KVCache.load(path, model)
    refused(path, model, "another precision")


@pytest.mark.parametrize("kv", ["none", "int8+window:6+sinks:2+sink_positions:cache"])
def test_adapters(kv: str, path: Path) -> None:
    model = adapted(llama())
    cache, text = saved(model, path, kv)
    refused(path, llama(), "another state of the adapters: active default .* and not none")
    refused(path, adapted(llama(), seed=2), "other weights")
    with model.disable_adapter():
        refused(path, model, "another state of the adapters: active default .* and not active none")
    model.merge_adapter()
    refused(path, model, "another state of the adapters: .* merged default")
    model.unmerge_adapter()
    again = adapted(llama())
    for each in (again, again.get_base_model()):
        assert everything(KVCache.load(path, each)) == everything(cache)
    with hfkv.patch(again, kv):
        base = again.get_base_model()
        assert torch.equal(go_on(base, KVCache.load(path, again), text), go_on(base, cache, text))


def test_a_merged_and_a_disabled_adapter_know_themselves(path: Path) -> None:
    model = adapted(llama())
    model.merge_adapter()
    cache, _ = saved(model, path)
    assert everything(KVCache.load(path, model)) == everything(cache)
    refused(path, adapted(llama()), "another state of the adapters: .*merged default")
    model = adapted(llama())
    with model.disable_adapter():
        cache, _ = saved(model, path)
        assert everything(KVCache.load(path, model)) == everything(cache)
    refused(path, model, "another state of the adapters: active none")
