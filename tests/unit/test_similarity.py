"""Attention similarity: against hooks of our own, in several architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    Qwen3NextConfig,
)

import hfkv
from hfkv import tiny_lm
from hfkv.eval import (
    attention_similarity,
    compare,
)
from hfkv.eval.similarity import attention_modules


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return tiny_lm.load(torch.float32)


@pytest.fixture(scope="module")
def ids(bundled: tuple[Any, Any]) -> torch.Tensor:
    return bundled[1](tiny_lm.held_out_text()[:100], add_special_tokens=False, return_tensors="pt").input_ids[0]


@pytest.mark.parametrize("kv", ["int4", "window:16"])
def test_attention_similarity_is_the_cosine_of_the_modules_outputs(ids: torch.Tensor, kv: str) -> None:
    # In float64: in float32 a value that lies between two codes may fall either way, by the shape of a chunk.
    model, _ = tiny_lm.load(torch.float64)

    def outputs(config: str) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        with torch.inference_mode(), hfkv.patch(model, config) as handle:
            cache = handle.new_cache()
            hooks = [
                layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[0]))
                for layer in model.model.layers
            ]
            model(ids[None, :100], past_key_values=cache)
        for hook in hooks:
            hook.remove()
        return found

    expected = [
        F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(outputs("none"), outputs(kv), strict=True)
    ]
    similarity = attention_similarity(model, ids[:100], kv, chunk=32)
    assert list(similarity) == [0, 1, 2, 3]
    assert list(similarity.values()) == pytest.approx(expected, abs=1e-4)
    assert min(expected) < 0.999
    (_, report) = compare(model, ids[:99], [kv], chunk=32)
    assert report.attention_similarity == pytest.approx(sum(report.attention_similarity_by_layer.values()) / 4)


def test_attention_similarity_of_the_full_cache_is_one(bundled: tuple[Any, Any], ids: torch.Tensor) -> None:
    assert attention_similarity(bundled[0], ids[:100], "paged") == pytest.approx(dict.fromkeys(range(4), 1.0), abs=1e-6)


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
ARCHITECTURES = {
    "GPT2Attention": (GPT2Config(vocab_size=99, bos_token_id=1, n_embd=32, n_layer=2, n_head=2), [0, 1]),
    "Gemma2Attention": (Gemma2Config(**SMALL, num_hidden_layers=2, num_key_value_heads=1), [0, 1]),
    "Qwen3NextAttention": (
        Qwen3NextConfig(
            **SMALL,
            num_hidden_layers=4,
            num_key_value_heads=1,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        [1, 3],
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_modules_are_found_in_any_architecture(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config, layers = ARCHITECTURES[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    found = attention_modules(model)
    assert {layer: type(module).__name__ for layer, module in found.items()} == dict.fromkeys(layers, name)
    with torch.inference_mode():
        _, report = compare(model, torch.randint(3, 99, (30,)), ["int4"], chunk=8)
    assert list(report.attention_similarity_by_layer) == layers
    assert 0.5 < report.attention_similarity < 0.99999
    assert sum("keep transformers' own cache" in record.message for record in caplog.records) <= 1
