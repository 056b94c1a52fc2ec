"""Which layers cache latents is known from a config: their widths, their windows and their captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

import hfkv
from hfkv.attention.device_step import step_reason
from hfkv.attention.latent.projection import Widths
from hfkv.kernels.backend import Kernel
from hfkv.models.latents import widths_of
from hfkv.models.shapes import Heads
from hfkv.patches.graphs import latent_reason
from hfkv.planning.geometry import Geometry
from hfkv.policy.errors import RequestError
from tests.tiny import llama_config
from tests.zoo import NAMED, CannotBuild, architectures, build, prompt

# Plain, sparse, sparse with sliding layers, and beside a linear attention.
FAMILIES = ("deepseek_v2", "minicpm3", "deepseek_v32", "glm_moe_dsa", "dots3_note", "bailing_hybrid", "kimi_linear")


def built(family: str) -> Any:
    found = [architecture for architecture in architectures() if architecture.model_type == family]
    if not found:
        pytest.skip(f"this transformers has no {family}")
    try:
        return build(found[0])
    except CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_widths_are_those_of_what_is_cached(family: str) -> None:
    geometry = Geometry.of(built(family).config, torch.float32)
    assert geometry.states
    for index, states in geometry.states.items():
        widths = widths_of(geometry.config, index)
        if widths is None:
            assert states.key_heads == geometry.config.num_attention_heads
            assert states.key_dim == geometry.config.qk_nope_head_dim + geometry.config.qk_rope_head_dim
        else:
            assert states[:4] == (1, widths.latent, 1, widths.rotary)


def test_layers_may_have_widths_of_their_own() -> None:
    config = DeepseekV3Config(num_hidden_layers=2, per_layer_config={1: {"kv_lora_rank": 256}})
    assert [widths_of(config, index) for index in range(2)] == [Widths(512, 128, 64, 128), Widths(256, 128, 64, 128)]


def test_code_without_the_method_caches_no_latents() -> None:
    fields = {"kv_lora_rank": 8, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
    assert widths_of(llama_config(**fields), 0) is None
    with pytest.raises(RequestError, match="hfkv bench mla"):
        Heads.of(DeepseekV3Config())


def test_no_head_of_latents_can_be_kept_whole() -> None:
    with pytest.raises(ValueError, match=r"names the kv heads \[0\] of layer 0; it has 0-0"):
        hfkv.KVCache(DeepseekV3Config(num_hidden_layers=2), "window:8+global_heads:0=0")


# Captured steps. Whether they give the same tokens is tests/kernels/test_triton_graphs.py's to say.


def after_a_prompt(model: Any) -> hfkv.KVCache:
    cache = hfkv.KVCache(model)
    with torch.no_grad():
        model(**prompt(model), past_key_values=cache)
    return cache


def test_a_step_is_captured_where_the_kernel_for_latents_is_a_triton_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = NAMED["deepseek_v3"]().model
    cache = after_a_prompt(model)
    assert "(torch: " in str(step_reason(cache, None, model.config))
    appended = Kernel("triton append", "for a test", None, reads_device_lengths=True)
    monkeypatch.setattr("hfkv.attention.device_step.append_kernel", lambda *_: appended)
    plain = Kernel("cpu latent", "for a test", None)
    monkeypatch.setattr("hfkv.attention.device_step.latent_kernel", lambda *_: plain)
    assert "(cpu latent: " in str(step_reason(cache, None, model.config))
    asked: list[Any] = []
    monkeypatch.setattr("hfkv.attention.device_step.latent_kernel", lambda *args: asked.append(args) or appended)
    assert step_reason(cache, None, model.config) is None
    assert {args[3:] for args in asked} == {(1, (32, 16), False)}


def test_a_step_is_not_captured_where_an_indexer_picks_tokens_or_latents_are_expanded() -> None:
    model = built("deepseek_v32")
    assert "layer 0 picks tokens by an index" in str(step_reason(after_a_prompt(model), None, model.config))
    model = NAMED["deepseek_v3"]().model
    assert latent_reason(model, torch.float32) is None
    assert "expands its latents at every step" in str(latent_reason(model, torch.bfloat16))
    linear = model.model.layers[1].self_attn.kv_b_proj
    linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    assert "has a bias" in str(latent_reason(model, torch.float32))
