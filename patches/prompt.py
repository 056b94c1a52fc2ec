"""PEFT prefix tuning: its learned keys and values go into an hfkv cache."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from hfkv.patches.undo import Undo
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicCache

from hfkv.cache import KVCache


def set_prompt_hook(peft_model: Any, undo: Undo) -> None:
    """Overrides `get_prompt` on this `PeftModel`, which would put its own cache in place of ours."""
    undo.set(peft_model, "get_prompt", MethodType(_get_prompt, peft_model))


def _get_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
    prompt = type(self).get_prompt(self, *args, **kwargs)
    # Training the prefix needs gradients through the cache: that stays PEFT's own.
    if torch.is_grad_enabled():
        return prompt
    if isinstance(prompt, EncoderDecoderCache):
        prompt.self_attention_cache = _refill(self, prompt.self_attention_cache)
        return prompt
    return _refill(self, prompt) if isinstance(prompt, DynamicCache) else prompt


def _refill(peft_model: Any, prefix: DynamicCache) -> KVCache:
    base = peft_model.get_base_model()
    cache = KVCache(base, base.hfkv.kv)
    for layer_idx, layer in enumerate(prefix.layers):
        if layer.is_initialized:
            cache.update(layer.keys, layer.values, layer_idx)
    return cache
