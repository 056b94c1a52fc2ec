"""`build_layers`: hfkv's layers in place of transformers', each from the first builder that gives one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.head_groups import SplitLayer
from hfkv.cache.layers.indexed import IndexedLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.layers.recent import RecentLayer
from hfkv.codecs.key_mean import KeyMean
from hfkv.models.latents import expands_latents, widths_of
from hfkv.models.parallel import parallel_plan_of
from hfkv.models.probe import base_model, cross_attention_layers, probe_rotary
from hfkv.models.rotary import Rotary
from hfkv.policy.config import KVConfig
from hfkv.policy.window import Window


def build_layers(
    stock: list[Any],
    config_or_model: Any,
    kv: KVConfig,
    rotary: Mapping[int, Rotary | None] | None,
    key_means: Mapping[int, KeyMean] | None = None,
) -> list[Any]:
    """Puts hfkv's layers in place of the plain layers of a `DynamicCache`; see `KVCache`.

    Raises:
        ValueError: there is no plain layer, or `kv` does not fit the layers.
    """
    _check_found(kv)
    config = decoder_config(config_or_model)
    cross = cross_attention_layers(config)
    if rotary is None and kv.needs_rotary:
        rotary = _probe(config_or_model)
    if key_means is None:
        key_means = _means_of(config_or_model)
    places = [
        LayerPlace(layer, index, kv.for_layer(index), config, rotary or {}, key_means.get(index))
        for index, layer in enumerate(stock)
    ]
    layers = [place.stock if place.index in cross else _replace(place) for place in places]
    _check_layers(layers, kv, config.model_type)
    _check_windows(layers, kv, config.model_type)
    _check_heads(kv, config)
    _check_spread(kv, config_or_model)
    return layers


def _check_found(kv: KVConfig) -> None:
    if kv.loss_change is not None:
        raise ValueError(
            f"{str(kv)!r} is a promise that a loaded model has to be measured for: hfkv.patch(model, kv=...) and "
            "KVConfig.for_fidelity(model) find the codecs that keep it; give the config that they find (on a patched "
            "model, model.hfkv.new_cache() has it)"
        )


def _check_layers(layers: list[Any], kv: KVConfig, model_type: str) -> None:
    ours = [layer for layer in layers if isinstance(layer, CacheLayer)]
    if not ours:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"{model_type!r} has no plain attention layer for an hfkv cache to hold (its layers are: "
            f"{', '.join(kinds) or 'none'}); use transformers' own cache"
        )
    window = kv.window
    named = {"KVConfig.layers": kv.last_named_layer}
    if isinstance(window, Window):
        named["Window.global_layers"] = max(window.global_layers, default=-1)
        named["Window.global_heads"] = max(window.global_heads, default=-1)
    for field, last in named.items():
        if last >= len(layers):
            raise ValueError(f"{field} names layer {last}; {model_type!r} has layers 0-{len(layers) - 1}")
    for index, layer in enumerate(layers):
        if kv.names_layer(index) and layer not in ours:
            raise ValueError(
                f"KVConfig.layers names layer {index}, which stays transformers' own ({type(layer).__name__})"
            )


def _check_windows(layers: list[Any], kv: KVConfig, model_type: str) -> None:
    ours = [layer for layer in layers if isinstance(layer, CacheLayer)]
    window = kv.window
    kept = {*window.global_layers, *window.global_heads} if isinstance(window, Window) else set()
    for index in kept:
        layer = layers[index]
        if not isinstance(layer, CacheLayer) or layer.is_sliding or kv.names_layer(index):
            raise ValueError(
                f"Window.global_layers or global_heads names layer {index}, which the window is not for: it slides "
                "by itself, stays transformers' own, or has a config of its own in KVConfig.layers"
            )
    if kv.recent is not None and not any(isinstance(layer, RecentLayer) for layer in ours):
        raise ValueError(
            f"recent was asked for, but no attention layer of {model_type!r} is left for it: each slides over tokens "
            f"of its own, all of them new, or has a config of its own; leave recent out, and take {kv.recent.codec}"
        )
    for index, layer in enumerate(layers):
        if not isinstance(layer, CacheLayer) or not layer.is_sliding:
            continue
        slides = f"it slides over {layer.leaves[0].sliding} tokens already"
        if kv.names_layer(index) and kv.for_layer(index).window is not None:
            raise ValueError(f"KVConfig.layers gives layer {index} a window, but {slides}")
    if window is not None and not any(layer.window and not layer.is_sliding for layer in ours):
        raise ValueError(
            f"a window was asked for, but no attention layer of {model_type!r} is left for it: each already "
            "slides over tokens of its own, or global_layers or KVConfig.layers keep it whole; leave the window out"
        )


def _check_heads(kv: KVConfig, config: PreTrainedConfig) -> None:
    heads = kv.window.global_heads if isinstance(kv.window, Window) else {}
    for index, named in heads.items():
        try:
            count = 1 if widths_of(config, index) else getattr(config, "num_key_value_heads", None)
        except RuntimeError:  # layers differ (gemma4), and the config refuses to say one number
            count = None
        # Layers may differ from the config (and a part of a model has fewer): those find out at the first key.
        if isinstance(count, int) and (named[-1] >= count or len(named) == count):
            raise ValueError(
                f"Window.global_heads names the kv heads {list(named)} of layer {index}; it has 0-{count - 1}, and "
                "at least one must slide (global_layers keeps whole layers)"
            )


def _check_spread(kv: KVConfig, config_or_model: Any) -> None:
    spread, window = parallel_plan_of(config_or_model), kv.window
    if spread.heads > 1 and isinstance(window, Window) and window.global_heads:
        raise ValueError(
            "Window.global_heads names kv heads of the whole model, and tensor parallelism gives each of "
            f"{spread.heads} processes only some of them; use global_layers"
        )


def decoder_config(config_or_model: Any) -> PreTrainedConfig:
    """The config of the decoder that a cache is for; see `KVCache`."""
    config = getattr(config_or_model, "config", config_or_model)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"an hfkv cache is built from a model or its config, got {type(config_or_model).__name__}. (DataParallel "
            "rebuilds caches from their data, which this cannot serve: use DistributedDataParallel, DDP)"
        )
    decoder = config.get_text_config(decoder=True)
    if not getattr(decoder, "num_attention_heads", None):
        raise ValueError(
            f"{decoder.model_type!r} has no attention heads in its config: there are no keys and values to cache"
        )
    return decoder


def _probe(config_or_model: Any) -> Mapping[int, Rotary | None]:
    if not isinstance(config_or_model, torch.nn.Module):
        raise ValueError(
            'sink_positions="cache" and summaries need to know how the model rotates its keys: build the cache from '
            "the model itself, not from its config, or use hfkv.patch(model, kv=...)"
        )
    return probe_rotary(config_or_model)


def _means_of(config_or_model: Any) -> Mapping[int, KeyMean]:
    """The means of a patched model's keys; none of another, or of a config."""
    if not isinstance(config_or_model, torch.nn.Module):
        return {}
    patched = vars(base_model(config_or_model)).get("hfkv")
    return {} if patched is None else patched.key_means


def is_replaced(layer: Any, config: PreTrainedConfig) -> bool:
    """Whether hfkv replaces a layer of transformers: a plain or sliding one, or one of latents with an index."""
    if type(layer) is DynamicIndexedLayer:
        return expands_latents(config)
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class LayerPlace:
    """The place in a model that a layer is built for.

    Attributes:
        stock: layer of transformers that is replaced.
        index: index of the layer in the model.
        kv: policies of the layer.
        config: config of the text decoder.
        rotary: rotation of the model's keys, by layer, as far as that was found out.
        mean: mean of the layer's keys, where it was found out.
    """

    stock: Any
    index: int
    kv: KVConfig
    config: PreTrainedConfig
    rotary: Mapping[int, Rotary | None]
    mean: KeyMean | None = None


def _recent(place: LayerPlace) -> CacheLayer | None:
    recent = place.kv.recent
    if recent is None:
        return None
    if type(place.stock) is DynamicSlidingWindowLayer:
        # All that it holds is new: nothing is left for fewer bits.
        kv = replace(place.kv, codec=recent.codec, recent=None)
        return KVLayer(kv, sliding=place.stock.sliding_window, mean=place.mean)
    if type(place.stock) is DynamicIndexedLayer or widths_of(place.config, place.index):
        raise ValueError(
            f"layer {place.index} holds latents (MLA), of which recent ones cannot be held in more bits than others; "
            "leave recent out, or give the layers a codec of more bits"
        )
    return RecentLayer(place.kv, place.mean)


def _indexed(place: LayerPlace) -> CacheLayer | None:
    if type(place.stock) is not DynamicIndexedLayer:
        return None
    if place.kv.window is not None:
        raise ValueError(
            f"layer {place.index} picks the tokens it attends to by an index over all of them, which a window would "
            "let go of; leave the window out"
        )
    return IndexedLayer(place.kv)


def _sliding(place: LayerPlace) -> CacheLayer | None:
    if type(place.stock) is not DynamicSlidingWindowLayer:
        return None
    return KVLayer(place.kv, sliding=place.stock.sliding_window, mean=place.mean)


def _windowed(place: LayerPlace) -> CacheLayer | None:
    window, index = place.kv.window, place.index
    if not isinstance(window, Window):
        return None
    if index in window.global_layers:
        return KVLayer(replace(place.kv, window=None), mean=place.mean)
    if window.needs_rotary and index not in place.rotary:
        raise ValueError(f"`rotary` says nothing of layer {index}; leave it out, or give all that probe_rotary returns")
    rotary = place.rotary.get(index)
    if index in window.global_heads:
        return SplitLayer(place.kv, window.global_heads[index], rotary, place.mean)
    return KVLayer(place.kv, rotary=rotary, mean=place.mean)


def _whole(place: LayerPlace) -> CacheLayer | None:
    return KVLayer(place.kv, rotary=place.rotary.get(place.index), mean=place.mean)


# The first builder that gives a layer is taken.
BUILDERS: list[Callable[[LayerPlace], CacheLayer | None]] = [_recent, _indexed, _sliding, _windowed, _whole]


def register_layer(build: Callable[[LayerPlace], CacheLayer | None]) -> None:
    """Registers a builder, asked before the others for every layer to replace; None leaves the layer to them.

    Raises:
        TypeError: it is no function from a `LayerPlace` to a `CacheLayer` or None.
    """
    if inspect.isclass(build) or not callable(build):
        raise TypeError(f"a builder of layers is a function from a LayerPlace to a CacheLayer or None, got {build!r}")
    BUILDERS.insert(0, build)


def _replace(place: LayerPlace) -> Any:
    """Builds hfkv's layer where `is_replaced`; leaves any other layer as it is."""
    if not is_replaced(place.stock, place.config):
        return place.stock
    build, layer = next((build, layer) for build in BUILDERS if (layer := build(place)) is not None)
    if not isinstance(layer, CacheLayer):
        name = getattr(build, "__qualname__", repr(build))
        raise TypeError(
            f"the builder {name} must return a CacheLayer, or None to leave layer {place.index}, got {layer!r}"
        )
    if widths_of(place.config, place.index):
        for leaf in layer.leaves:
            leaf.values_innermost = False  # beside latents, the values are rotary keys
    return layer
