"""Refusals: why the prompts of a model cannot share prefixes at all, and why no file can hold a cache."""

from __future__ import annotations

from typing import Any

from hfkv.cache.kv_cache import KVCache
from hfkv.cache.layers.base import CacheLayer
from hfkv.models.probe import growing_rope_type


def sharing_refusal(config: Any, cache: KVCache) -> str | None:
    """Why the prompts of a model of this config cannot be shared at all, in words, or None where they can."""
    name = config.model_type
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder: its keys and values depend on more than the tokens before them"
    others = sorted({type(layer).__name__ for layer in cache.layers if layer not in cache.kv_layers})
    if others:
        return f"{name} has layers whose state is not a token's own ({', '.join(others)})"
    refusals = (layer.sharing_refusal or layer.file_refusal for layer in cache.kv_layers)
    refusal = next(filter(None, refusals), None)
    if refusal is not None:
        return f"{name} {refusal}"
    changing = growing_rope_type(config.get_text_config(decoder=True))
    if changing is not None:
        return f"the {changing} rotary scaling of {name} changes with the length of the text"
    return None


def check_files_hold(cache: KVCache) -> None:
    """Checks that a file holds all that the layers of a cache keep.

    Raises:
        NotImplementedError: a layer keeps more than tokens.
    """
    for index, layer in enumerate(cache.layers):
        refusal = layer.file_refusal if isinstance(layer, CacheLayer) else None
        if refusal is not None:
            raise NotImplementedError(
                f"such a cache can be neither saved nor loaded: layer {index} ({type(layer).__name__}) {refusal}; "
                "prefill the prompt instead, or fork the cache"
            )
