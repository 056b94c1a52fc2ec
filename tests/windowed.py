"""One text read through a window of the cache, in forwards of any length, and by brute force."""

import functools
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hfkv
from hfkv import KVConfig, Window
from tests import brute_force
from tests.tiny import greedy, llama, llama_config, prompt

LENGTH = 90
SPLITS = {"whole": LENGTH, "chunks": 5, "one by one": 1}
PADS = {"no padding": (0, 0, 0), "ragged": (0, 3, 23)}
LAYERS = ["sliding_attention", "full_attention"]
RULES = [
    Window(64, 4),
    Window(6, 2, sink_positions="cache"),
    Window(6, 2, summary="mean", summary_pages=3, summary_page_size=4),
]
MODELS: dict[str, Any] = {
    "llama": (None, None, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 6, "layer_types": LAYERS}),
    "glm4": (Glm4ForCausalLM, Glm4Config, {}),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 20,
        },
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "sliding_window": 6,
            "layer_types": LAYERS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
DYNAMIC = {
    "shrinks": lambda seen: 40 if seen < 50 else 9,
    "jumps": lambda seen: 5 + 11 * (seen % 7),
}


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model_class, config_class, fields = MODELS[name]
    if model_class is None:
        return llama().to(dtype)
    common = llama_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
    torch.manual_seed(0)
    model = model_class(config_class(**{name: common[name] for name in names} | fields)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype)


@functools.cache
def expected(name: str, kv: KVConfig, padding: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        model = model_of(name, dtype)
        with hfkv.patch(model, kv) as handle:
            means = handle.key_means
        return brute_force.logits(model, ids(), kv, PADS[padding], means)


@functools.cache
def ids() -> torch.Tensor:
    return prompt(batch=3, length=LENGTH)["input_ids"]


def through_cache(model: Any, kv: KVConfig, padding: str, split: int) -> torch.Tensor:
    """Logits of a text given to a cache in forwards of `split` tokens."""
    pads = PADS[padding]
    mask = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long()
    positions = brute_force.positions(ids(), pads)
    parts = []
    with torch.no_grad(), hfkv.patch(model, kv):
        cache = model.hfkv.new_cache()
        for first in range(0, LENGTH, split):
            now = slice(first, first + split)
            inputs = {"position_ids": positions[:, now], "past_key_values": cache}
            if any(pads):
                inputs["attention_mask"] = mask[:, : first + split]
            parts.append(model(ids()[:, now], **inputs).logits)
    return torch.cat(parts, dim=1)


def assert_ways_agree(model: Any, assistant: Any, kv: KVConfig | str, inputs: dict[str, torch.Tensor]) -> None:
    """Asserts that assistants and chunks change no token of a patched model's; the assistant is patched here."""
    plain = greedy(model, inputs, 40)
    assert torch.equal(plain, greedy(model, inputs, 40, prompt_lookup_num_tokens=4))
    with hfkv.patch(assistant, kv):
        assert torch.equal(plain, greedy(model, inputs, 40, assistant_model=assistant))
    beams = greedy(model, inputs, 40, num_beams=3)
    assert torch.equal(beams, greedy(model, inputs, 40, num_beams=3, prefill_chunk_size=2))


def error(name: str, kv: KVConfig, padding: str, split: str, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference of a real token's logits, as a share of the largest logit."""
    reference = expected(name, kv, padding, dtype)
    ours = through_cache(model_of(name, dtype), kv, padding, SPLITS[split])
    real = torch.arange(LENGTH) >= torch.tensor(PADS[padding])[:, None]
    return float((ours - reference)[real].abs().max() / reference[real].abs().max())
