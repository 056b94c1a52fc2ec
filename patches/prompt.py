"""PEFT's learned prompts: their keys and values go into an hfkv cache, and a used one is read anew behind them."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import torch
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicCache

from hfkv.cache.kv_cache import KVCache
from hfkv.models.parallel import own_layers, parallel_plan_of
from hfkv.patches.continuing import text_length
from hfkv.patches.undo import Undo

# PEFT asks for the prefix deep inside `generate` and names no cache. `.cache` refers weakly to the one of this
# thread's running call.
_call = threading.local()


def expect_prefix(model: Any, cache: KVCache | None) -> int:
    """Notes the cache that a learned prefix goes into, or None where the call has none of ours.

    Returns:
        How many virtual tokens PEFT will add to the prompt.
    """
    _call.cache = (lambda: None) if cache is None else weakref.ref(cache)
    peft_model = learned_prompt(model)
    if peft_model is None:
        return 0
    if "get_prompt" not in vars(peft_model):
        set_prompt_hook(peft_model, model.hfkv._undo)
    return peft_model.active_peft_config.num_virtual_tokens


def learned_prompt(model: Any) -> Any:
    """The `PeftModel` that puts learned tokens before the prompts of the running call, or None."""
    # PEFT puts its own method here while it generates: so a model that was wrapped after `patch` is found too.
    peft_model = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    config = getattr(peft_model, "active_peft_config", None)
    return None if config is None or not config.is_prompt_learning else peft_model


def in_words(peft_model: Any) -> str:
    """Says what a `PeftModel` puts before the prompts, as the state of its adapters."""
    config = peft_model.active_peft_config
    return f"{config.num_virtual_tokens} learned tokens ({getattr(config.peft_type, 'value', config.peft_type)})"


def check_candidates(model: Any) -> None:
    """Refuses assisted decoding behind a learned prompt: PEFT gives the model one token of all candidates.

    Raises:
        NotImplementedError: PEFT puts learned tokens before the text.
    """
    peft_model = learned_prompt(model)
    if peft_model is not None:
        raise NotImplementedError(
            f"assisted decoding and prompt lookup where PEFT puts {in_words(peft_model)} before the text: PEFT passes "
            "on one token of each forward, and the candidates would be lost; leave assistant_model and "
            "prompt_lookup_num_tokens out"
        )


def read_anew(
    model: Any, cache: KVCache, ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> Any:
    """Makes `generate` read a whole text in one forward, where PEFT puts learned tokens before it.

    PEFT takes what a cache holds for the learned tokens and the text before one new token: it would leave out others,
    and misplace what follows.

    Args:
        model: the patched model.
        cache: the cache; a used one is reset.
        ids: the prompt, int64 `[B, T]`.
        generation_config, model_kwargs: the running call's; positions in `model_kwargs` become the prompt's.

    Returns:
        The generation config to read with.

    Raises:
        ValueError: `ids` are only what is new.
    """
    peft_model = learned_prompt(model)
    if peft_model is None:
        return generation_config
    name, why = type(model).__name__, f"PEFT puts {in_words(peft_model)} before the text"
    seen, length = cache.get_seq_length(), ids.shape[1]
    if seen:
        if text_length(generation_config, model_kwargs) not in (None, length):
            raise ValueError(
                f"past_key_values holds {seen} tokens and the prompt is {length} new ones alone: {why}, and can only "
                "read it from its beginning. Give the whole text"
            )
        model.hfkv.log_once(f"{name}: a used cache is reset and the whole text read anew: {why}")
        cache.reset()
        positions = model_kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] > length:
            model_kwargs["position_ids"] = positions[..., :length]
    if generation_config.prefill_chunk_size is not None:
        model.hfkv.log_once(f"{name}: prefill_chunk_size has no effect: {why}, and can only read it whole")
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
    return generation_config


def set_prompt_hook(peft_model: Any, undo: Undo) -> None:
    """Overrides `get_prompt` on this `PeftModel`, which would put its own cache in place of ours."""
    undo.override(_get_prompt, peft_model, "get_prompt", needs_patch=False)


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
    if parallel_plan_of(base).heads > 1:
        raise NotImplementedError(
            "PEFT's prefix tuning has keys and values of all kv heads, and tensor parallelism gives each process only "
            "some of them: load the model without tp_size (pp_size will do)"
        )
    cache = getattr(_call, "cache", lambda: None)()
    if cache is None or cache.get_seq_length():
        cache = base.hfkv.new_cache()
    for layer_idx in own_layers(base, len(prefix.layers)):
        layer = prefix.layers[layer_idx]
        if layer.is_initialized:
            cache.update(layer.keys, layer.values, layer_idx)
    return cache
