"""Gives every `generate` call of a model a fresh hfkv cache."""

from __future__ import annotations

import inspect
import logging
from types import MethodType
from typing import Any

from hfkv.patches.undo import Undo
from transformers import EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from hfkv.cache import KVCache

logger = logging.getLogger("hfkv")

HOOK = "_prepare_cache_for_generation"
_SIGNATURE = ["self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"]


def check_generate(model: PreTrainedModel) -> None:
    """Refuses a model whose `generate` would never ask the hook for a cache.

    Raises:
        TypeError: the model cannot generate.
        ValueError: its `generate` does not use a layered cache from the hook.
        NotImplementedError: the hook's signature is not the one this was written for.
    """
    name = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"{name} has no generate(); patch the model that has one (AutoModelForCausalLM, say)")
    given = list(inspect.signature(getattr(type(model), HOOK)).parameters)
    if given != _SIGNATURE:
        raise NotImplementedError(
            f"{name}.{HOOK} takes {given}; hfkv knows {_SIGNATURE}. Use an explicit cache: "
            "model.generate(past_key_values=hfkv.KVCache(model, kv=...))"
        )
    if not model._supports_default_dynamic_cache():
        raise ValueError(f"{name} does not use a layered KV cache; hfkv has nothing to replace in it")
    if type(model).generate is not GenerationMixin.generate and not _reaches_hook(type(model)):
        raise ValueError(
            f"{name} has a generate() of its own that never asks for a layered KV cache; if it holds a text "
            "decoder that does (model.text_decoder, say), patch that"
        )


def _reaches_hook(model_class: type) -> bool:
    """Whether a class that overrides `generate` still goes through transformers' own, or calls the hook itself."""
    own = model_class.__mro__[: model_class.__mro__.index(GenerationMixin)]
    sources = [inspect.getsource(base) for base in own if "generate" in vars(base)]
    return any("super().generate(" in source or HOOK in source for source in sources)


def set_cache_hook(model: PreTrainedModel, undo: Undo) -> None:
    """Overrides `_prepare_cache_for_generation` on this instance."""
    undo.set(model, HOOK, MethodType(_prepare_cache, model))


def _prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    given = model_kwargs.get("past_key_values")
    result = getattr(type(self), HOOK)(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    if given is not None:
        _check_fits(given, self)
        return result
    cache = model_kwargs.get("past_key_values")
    if cache is None or generation_config.cache_implementation not in (None, "dynamic"):
        logger.info("use_cache=False or cache_implementation was asked for: hfkv leaves this call alone")
        return result
    model_kwargs["past_key_values"] = fresh_cache(self, cache)
    own: KVCache = getattr(model_kwargs["past_key_values"], "self_attention_cache", model_kwargs["past_key_values"])
    own.reserve(max_cache_length)
    if generation_config.is_assistant:
        own.activate_past_recording()
    return result


def fresh_cache(model: Any, stock: Cache) -> Cache:
    """The cache to use in place of the empty `stock`: cross-attention stays transformers' own."""
    if isinstance(stock, EncoderDecoderCache):
        return EncoderDecoderCache(KVCache(model, model.hfkv.kv), stock.cross_attention_cache)
    if type(stock) is not DynamicCache:
        raise NotImplementedError(
            f"{type(model).__name__} prepared a {type(stock).__name__}, which hfkv does not know how to replace; "
            "call hfkv.unpatch(model)"
        )
    return KVCache(model, model.hfkv.kv)


def _check_fits(cache: Any, model: Any) -> None:
    own = getattr(cache, "self_attention_cache", cache)
    if not isinstance(own, KVCache):
        return
    expected = model.config.get_text_config(decoder=True)
    if (own.model_type, len(own.layers)) != (expected.model_type, expected.num_hidden_layers):
        raise ValueError(
            f"past_key_values was built for a {own.model_type!r} model of {len(own.layers)} layers, and this is a "
            f"{expected.model_type!r} model of {expected.num_hidden_layers}; build it with KVCache(model, kv=...)"
        )
