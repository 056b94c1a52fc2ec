"""Fresh hfkv caches, for `generate` calls and for forwards that would make a stock one."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import transformers
from transformers import EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache

from hfkv.cache.factory import BUILDERS
from hfkv.cache.kv_cache import KVCache

# The method of a model by which `generate` makes a cache.
HOOK = "_prepare_cache_for_generation"
_STOCK = GenerationMixin._prepare_cache_for_generation


def self_attention_of(cache: Any) -> Any:
    """The cache of the decoder's own tokens: within an `EncoderDecoderCache`, or `cache` itself."""
    return getattr(cache, "self_attention_cache", cache)


def check_cache(model: Any, cache: Any) -> None:
    """Refuses an hfkv cache that the model's code would misread.

    Raises:
        ValueError: the model is an encoder-decoder, and the cache is not within an `EncoderDecoderCache`.
        NotImplementedError: its attention cannot read a cache that is not plain tensors.
    """
    if isinstance(cache, KVCache) and model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its self- and cross-attention would share the layers of "
            "one KVCache. Give EncoderDecoderCache(cache, DynamicCache(config=model.config)), both from transformers"
        )
    own = self_attention_of(cache)
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if isinstance(own, KVCache) and attention == "flex_attention":
        raise NotImplementedError(
            "flex_attention compiles what it is given and cannot read the caches of hfkv: call "
            'model.set_attn_implementation("hfkv"), "sdpa" or "eager", or hfkv.unpatch(model)'
        )


def fresh_cache(model: Any, stock: Cache) -> Cache:
    """The cache to use in place of the empty `stock`: cross-attention stays transformers' own."""
    if isinstance(stock, EncoderDecoderCache):
        return EncoderDecoderCache(_empty_cache(model, stock.self_attention_cache), stock.cross_attention_cache)
    if type(stock) is not DynamicCache:
        raise NotImplementedError(
            f"{type(model).__name__} prepared a {type(stock).__name__}, which hfkv does not know how to replace; "
            "call hfkv.unpatch(model)"
        )
    return _empty_cache(model, stock)


def _empty_cache(model: Any, stock: Cache) -> KVCache:
    """An empty cache; it is built anew only where the model's layers are others than at the last call."""
    patch = model.hfkv
    rotary, layers = patch.rotary, [(type(layer), getattr(layer, "sliding_window", None)) for layer in stock.layers]
    kind = (patch.kv, layers, model.config.model_type, tuple(BUILDERS))
    blueprint = patch.blueprint
    if blueprint is None or blueprint.kind != kind or blueprint.rotary is not rotary:
        # While an assistant exits early, the config names fewer layers than the patch was made for.
        kv = patch.own_kv.first_layers(model.config.get_text_config(decoder=True).num_hidden_layers)
        cache = KVCache(model, kv, rotary, patch.key_means)
        if cache.offload is not None:
            return cache  # what is forked from it would share its budget
        blueprint = patch.blueprint = Blueprint(kind, rotary, cache, _settings(model))
    return blueprint.cache.fork()


def cache_as_before(model: Any, generation_config: Any) -> KVCache | None:
    """The cache that `fresh_cache` would make, without transformers' own; None where that has to be looked at.

    It is known where the last call took a plain one and the config has not changed since.
    """
    patch = model.hfkv
    blueprint = patch.blueprint
    is_plain = generation_config.use_cache is not False and generation_config.cache_implementation in (None, "dynamic")
    if blueprint is None or not is_plain or model.config.is_encoder_decoder or blueprint.rotary is not patch.rotary:
        return None
    kv, _, model_type, builders = blueprint.kind
    before, now = (kv, model_type, builders), (patch.kv, model.config.model_type, tuple(BUILDERS))
    if before != now or blueprint.settings != _settings(model):
        return None
    is_stock = getattr(type(model), HOOK) is _STOCK
    return blueprint.cache.fork() if is_stock and model._supports_default_dynamic_cache() else None


def _settings(model: Any) -> dict[str, Any]:
    """What a config says of the layers of a cache, and all else; lists as they are now."""
    settings = vars(model.config.get_text_config(decoder=True))
    return {name: list(value) if type(value) is list else value for name, value in settings.items()}


class Blueprint(NamedTuple):
    """An empty cache, and what it was built for."""

    kind: tuple[Any, ...]
    rotary: Any
    cache: KVCache
    settings: dict[str, Any]


def with_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a forward of a patched model, with an hfkv cache where the model would make a stock one.

    Scoring and guidance call models without `generate`; and Phi-3 drops the cache inside it, where a text crosses the
    length at which its rotary factors change.

    Args:
        model: the patched model.
        args, kwargs: the arguments of its forward.

    Raises:
        NotImplementedError: the model is given the newest tokens of a text without what came before.
    """
    if kwargs.get("past_key_values") is not None:
        return kwargs
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_traced and (model.hfkv.kv.is_lossless or kwargs.get("use_cache") is False):
        return kwargs
    names = parameters(type(model))
    if "past_key_values" not in names:
        return kwargs
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("past_key_values") is not None:
        return kwargs
    config = model.config.get_text_config(decoder=True)
    wants_cache = given.get("use_cache")
    wants_cache = getattr(config, "use_cache", False) if wants_cache is None else wants_cache
    patch, name = model.hfkv, type(model).__name__
    why = "it was called with use_cache=False"
    if wants_cache:
        why = "gradients flow through no hfkv cache" if torch.is_grad_enabled() else patch.cacheless_reason
    if why is not None:
        if not patch.kv.is_lossless:
            patch.log_once(f"{name}: kv={str(patch.kv)!r} has no effect on a forward: {why}")
        return kwargs
    if getattr(config, "original_max_position_embeddings", None) is not None:
        _check_whole(given, name)
    stock: Cache = DynamicCache(config=config)
    if model.config.is_encoder_decoder:
        stock = EncoderDecoderCache(stock, DynamicCache(config=config))
    return {**kwargs, "past_key_values": fresh_cache(model, stock)}


def _check_whole(given: dict[str, Any], name: str) -> None:
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    mask = given.get("attention_mask")
    if not isinstance(tokens, torch.Tensor) or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    if tokens.dim() > 1 and mask.shape[1] > tokens.shape[1]:
        raise NotImplementedError(
            f"{name} was called without a cache for {tokens.shape[1]} tokens, with an attention mask of "
            f"{mask.shape[1]}: the others would not be read. transformers {transformers.__version__} drops the cache "
            "so where a text crosses original_max_position_embeddings (longrope) and does not read it anew: update "
            "transformers, or keep prompt and new tokens on one side of that length"
        )


@functools.cache
def parameters(model_class: type) -> tuple[str, ...]:
    """The names of a forward's parameters."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]  # type: ignore[attr-defined]


def log_stock_cache(model: Any, given: Any, returned: Any) -> None:
    """Logs once that a forward has put a cache of its own in place of ours."""
    own = self_attention_of(returned)
    if returned is None or returned is given or isinstance(own, KVCache):
        return
    name, kind = type(model).__name__, type(own).__name__
    model.hfkv.log_once(
        f"{name}: its forward returned a {kind} in place of the hfkv cache it was given: kv has no effect from there on"
    )
