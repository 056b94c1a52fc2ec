"""A tiny random Llama whose greedy text varies, for tests that need any model at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfkv import KVCache


def llama_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**fields, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(**changes)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def llama_for(kv: str, **changes: Any) -> LlamaForCausalLM:
    """`llama`, in float64 where `kv` is lossy, for texts that are cut in different ways.

    Products of other shapes differ in their last bits, by the processor, and in float32 a value that lies between two
    codes falls either way now and then, which the logits show.
    """
    model = llama(**changes)
    return model.double() if any(codec in kv for codec in ("int8", "int4", "fp8", "int3", "int2")) else model


def prompt(batch: int = 2, length: int = 9, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random ids `[batch, length]`, the first row with `padding` pad tokens on its left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (batch, length))
    mask = torch.ones_like(ids)
    ids[0, :padding] = 0
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int = 12, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)


def states(batch: int = 1, tokens: int = 5) -> torch.Tensor:
    """Random keys or values of a layer of `llama`."""
    return torch.randn(batch, 2, tokens, 16)


def feed(cache: KVCache, batch: int, tokens: int, head_dim: int = 16) -> None:
    """Random keys and values for every layer of a cache."""
    for layer_idx in range(len(cache.layers)):
        cache.update(torch.randn(batch, 2, tokens, head_dim), torch.randn(batch, 2, tokens, head_dim), layer_idx)


def text(batch: int, length: int) -> torch.Tensor:
    """Random ids `[batch, length]`, none of them padding."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))
