"""`KVCache`: transformers' cache, with a `KVLayer` for every plain attention layer; and four names for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hfkv.config import KVConfig
from hfkv.layer import KVLayer
from hfkv.stores.base import storage_bytes
from hfkv.window import Window


class KVCache(DynamicCache):
    """A KV cache from three policies; goes into ``model.generate(past_key_values=...)`` or a forward call.

    Layers of the model with their own sliding window keep it. Linear-attention, indexed and dummy layers and
    cross-attention stay transformers' own.

    Args:
        config_or_model: a model, or its config.
        kv: a `KVConfig`, its string form, or None: lossless.

    Raises:
        TypeError: the first argument is neither (DataParallel rebuilds caches from data: use DDP).
        ValueError: the model has no layer this can hold, or `kv` does not fit its layers.
    """

    def __init__(self, config_or_model: Any, kv: KVConfig | str | None = None) -> None:
        config = _decoder_config(config_or_model)
        self.kv = KVConfig.of(kv)
        self.model_type: str = config.model_type
        super().__init__(config=config)
        # Some multimodal decoders (mllama) cache cross-attention in the same list.
        cross = set(getattr(config, "cross_attention_layers", None) or ())
        self.layers: list[Any] = [
            layer if index in cross else _replace(layer, self.kv.for_layer(index))
            for index, layer in enumerate(self.layers)
        ]
        self._check(config)

    def _check(self, config: PreTrainedConfig) -> None:
        ours = self.kv_layers
        if not ours:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(
                f"{config.model_type!r} has no plain attention layer for an hfkv cache to hold (its layers are: "
                f"{', '.join(kinds) or 'none'}); use transformers' own cache"
            )
        if self.kv.last_named_layer >= len(self.layers):
            raise ValueError(
                f"KVConfig.layers names layer {self.kv.last_named_layer}; {config.model_type!r} has layers "
                f"0-{len(self.layers) - 1}"
            )
        for index, layer in enumerate(self.layers):
            override = self.kv.for_layer(index) if self.kv.names_layer(index) else None
            if override is not None and not isinstance(layer, KVLayer):
                raise ValueError(
                    f"KVConfig.layers names layer {index}, which stays transformers' own ({type(layer).__name__})"
                )
            if override is not None and override.window is not None and layer.is_sliding:
                raise ValueError(
                    f"KVConfig.layers gives layer {index} a window, but it slides over {layer.window.size} tokens "
                    "already"
                )
        if self.kv.window is not None and all(layer.is_sliding for layer in ours):
            raise ValueError(
                f"a window was asked for, but every attention layer of {config.model_type!r} already slides over "
                f"{ours[0].window.size if ours[0].window else 0} tokens; leave the window out"
            )

    @property
    def kv_layers(self) -> list[KVLayer]:
        """The layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends to one layer; see `KVLayer.update`."""
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"this cache was built for {len(self.layers)} layers and was given keys of layer {layer_idx}: it "
                "was built from another model's config. Build it from this model: KVCache(model, kv=...)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens from every layer, or, where one of ours cannot, from none."""
        ours = self.kv_layers
        for layer in ours:
            layer.span.after_crop(int(tokens_to_remove))
        for layer in (*(layer for layer in self.layers if layer not in ours), *ours):  # others may refuse too
            layer.crop(tokens_to_remove)

    def reserve(self, tokens: int) -> None:
        """Says how many tokens a row will hold in all, so that memory is allocated once."""
        for layer in self.kv_layers:
            layer.reserve(tokens)

    def nbytes(self) -> int:
        """Bytes allocated: the sum over unique storages, layers of transformers' own included."""
        others = [layer for layer in self.layers if not isinstance(layer, KVLayer)]
        return sum(layer.nbytes() for layer in self.kv_layers) + storage_bytes(_tensors(others))

    def held_bytes(self) -> int:
        """Bytes of the tokens held, shared ones counted once."""
        others = [layer for layer in self.layers if not isinstance(layer, KVLayer)]
        return sum(layer.held_bytes() for layer in self.kv_layers) + storage_bytes(_tensors(others))

    @property
    def holds_tokens(self) -> None:
        """Which tokens the cache holds: unknown, since a cache only ever sees keys and values."""
        return None


class SlidingWindowCache(KVCache):
    """Keeps the newest `window` tokens and the first `sinks`; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, window: int, sinks: int = 4, **policies: Any) -> None:
        super().__init__(config_or_model, KVConfig(window=Window(window, sinks), **policies))


class QuantizedCache(KVCache):
    """Keeps every token in fewer bits; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, codec: str = "int8", **policies: Any) -> None:
        super().__init__(config_or_model, KVConfig(codec=codec, **policies))


class OffloadedCache(KVCache):
    """Keeps every token in host memory; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, **policies: Any) -> None:
        super().__init__(config_or_model, KVConfig(offload=True, **policies))


class PagedCache(KVCache):
    """Keeps every token in pages that beams share; other policies as keywords of `KVConfig`."""

    def __init__(self, config_or_model: Any, page_size: int | None = None, **policies: Any) -> None:
        super().__init__(config_or_model, KVConfig(store="paged", page_size=page_size, **policies))


def _decoder_config(config_or_model: Any) -> PreTrainedConfig:
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


def _replace(layer: Any, kv: KVConfig) -> Any:
    """A `KVLayer` in place of a plain full or sliding layer; any other layer as it is."""
    if type(layer) is DynamicLayer:
        return KVLayer(kv)
    if type(layer) is DynamicSlidingWindowLayer:
        return KVLayer(kv, sliding=layer.sliding_window)
    return layer


def _tensors(layers: list[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else (value,)
            found += [tensor for tensor in values if isinstance(tensor, torch.Tensor)]
    return found
