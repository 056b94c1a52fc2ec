"""`KVCache`: transformers' cache, with a `KVLayer` for every plain attention layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hfkv.config import KVConfig
from hfkv.layer import KVLayer
from hfkv.probe import cross_attention_layers, probe_rotary
from hfkv.record import TokenRecord
from hfkv.rotary import Rotary
from hfkv.split import SplitLayer
from hfkv.stores.base import storage_bytes
from hfkv.window import Window

OURS = (KVLayer, SplitLayer)


class KVCache(DynamicCache):
    """A KV cache from three policies; goes into ``model.generate(past_key_values=...)`` or a forward call.

    Layers of the model with their own sliding window keep it. Linear-attention, indexed and dummy layers and
    cross-attention stay transformers' own.

    Args:
        config_or_model: a model, or its config. ``sink_positions="cache"`` and summaries need the model: how it
            rotates its keys is found out by a forward pass over a few tokens.
        kv: a `KVConfig`, its string form, or None: lossless.
        rotary: what `probe_rotary` has found out about the model already, by layer.

    Raises:
        TypeError: the first argument is neither (DataParallel rebuilds caches from data: use DDP).
        ValueError: the model has no layer this can hold, or `kv` does not fit its layers, or asks
            for reuse.
    """

    def __init__(
        self,
        config_or_model: Any,
        kv: KVConfig | str | None = None,
        rotary: Mapping[int, Rotary | None] | None = None,
    ) -> None:
        config = _decoder_config(config_or_model)
        self.kv = KVConfig.of(kv)
        if self.kv.reuse is not None:
            raise ValueError(
                "reuse is between the calls of a patched model, not of one cache: hfkv.patch(model, kv=...), or share "
                "a prefix by hand with cache.fork(n)"
            )
        self.model_type: str = config.model_type
        super().__init__(config=config)
        self.record = TokenRecord()
        cross = cross_attention_layers(config)
        if rotary is None and self.kv.needs_rotary:
            rotary = _probe(config_or_model)
        self.layers: list[Any] = [
            layer if index in cross else _replace(layer, index, self.kv.for_layer(index), rotary or {})
            for index, layer in enumerate(self.layers)
        ]
        self._check_layers()
        self._check_windows()
        self._check_heads(config)

    def _check_layers(self) -> None:
        if not self.kv_layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(
                f"{self.model_type!r} has no plain attention layer for an hfkv cache to hold (its layers are: "
                f"{', '.join(kinds) or 'none'}); use transformers' own cache"
            )
        window = self.kv.window
        named = {"KVConfig.layers": self.kv.last_named_layer}
        if isinstance(window, Window):
            named["Window.global_layers"] = max(window.global_layers, default=-1)
            named["Window.global_heads"] = max(window.global_heads, default=-1)
        for field, last in named.items():
            if last >= len(self.layers):
                raise ValueError(f"{field} names layer {last}; {self.model_type!r} has layers 0-{len(self.layers) - 1}")
        for index, layer in enumerate(self.layers):
            if self.kv.names_layer(index) and layer not in self.kv_layers:
                raise ValueError(
                    f"KVConfig.layers names layer {index}, which stays transformers' own ({type(layer).__name__})"
                )

    def _check_windows(self) -> None:
        window = self.kv.window
        kept = {*window.global_layers, *window.global_heads} if isinstance(window, Window) else set()
        for index in kept:
            layer = self.layers[index]
            if not isinstance(layer, OURS) or layer.is_sliding or self.kv.names_layer(index):
                raise ValueError(
                    f"Window.global_layers or global_heads names layer {index}, which the window is not for: it slides "
                    "by itself, stays transformers' own, or has a config of its own in KVConfig.layers"
                )
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, KVLayer) or not layer.is_sliding:
                continue
            slides = f"it slides over {layer.sliding} tokens already"
            if self.kv.names_layer(index) and self.kv.for_layer(index).window is not None:
                raise ValueError(f"KVConfig.layers gives layer {index} a window, but {slides}")
        if window is not None and not any(layer.window and not layer.is_sliding for layer in self.kv_layers):
            raise ValueError(
                f"a window was asked for, but no attention layer of {self.model_type!r} is left for it: each already "
                "slides over tokens of its own, or global_layers or KVConfig.layers keep it whole; leave the window out"
            )

    def _check_heads(self, config: PreTrainedConfig) -> None:
        heads = self.kv.window.global_heads if isinstance(self.kv.window, Window) else {}
        for index, named in heads.items():
            try:
                count = getattr(config, "num_key_value_heads", None)
            except RuntimeError:  # layers differ (gemma4), and the config refuses to say one number
                count = None
            # Layers may differ from the config (and a part of a model has fewer): those find out at the first key.
            if isinstance(count, int) and (named[-1] >= count or len(named) == count):
                raise ValueError(
                    f"Window.global_heads names the kv heads {list(named)} of layer {index}; it has 0-{count - 1}, and "
                    "at least one must slide (global_layers keeps whole layers)"
                )

    @property
    def kv_layers(self) -> list[KVLayer | SplitLayer]:
        """The layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, OURS)]

    @property
    def leaves(self) -> list[KVLayer]:
        """The layers that are ours, those split by heads in their parts."""
        return [
            leaf for layer in self.kv_layers for leaf in (layer.parts if isinstance(layer, SplitLayer) else (layer,))
        ]

    @property
    def batch_size(self) -> int | None:
        """Rows held; None before the first key."""
        return next((leaf.batch for leaf in self.leaves if leaf.is_initialized), None)

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
            layer.check_crop(tokens_to_remove)
        for layer in (*(layer for layer in self.layers if layer not in ours), *ours):  # others may refuse too
            layer.crop(tokens_to_remove)
        if self.get_seq_length():
            self.record.crop(self.get_seq_length())
        else:
            self.record.forget()
            for leaf in self.leaves:
                leaf.is_assigned = False

    def reset(self) -> None:
        """Forgets everything; another batch, model or adapter may come."""
        super().reset()
        self.record.forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self.record.select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows `indices`: positions, a bool mask or a slice."""
        super().batch_select_indices(indices)
        self.record.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; pages are shared until they are written to."""
        batch = self.batch_size
        for layer in self.layers:
            _repeat(layer, batch, repeats)
        self.record.repeat(repeats)

    def fork(self, n: int = 1) -> KVCache:
        """Copies that go on by themselves: a cache of its own that holds every row `n` times, row after row.

        Pages are shared until they are written to: with ``store="paged"`` only the last, partly filled page is ever
        copied. ``"auto"`` puts a prefix of some length into pages when `n` is more than 1; ``"contiguous"`` copies all.

        Args:
            n: copies of each row: the number of questions, beams or samples that continue a prefix.

        Raises:
            TypeError, ValueError: `n` is not a whole number of at least 1.
        """
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"cache.fork takes a number of copies, got {n!r}")
        if n < 1:
            raise ValueError(f"cache.fork takes a number of copies of at least 1, got {n}")
        forked = copy.copy(self)
        forked.layers = [layer.fork(n) if isinstance(layer, OURS) else copy.deepcopy(layer) for layer in self.layers]
        if n > 1:
            for layer in forked.layers:
                if not isinstance(layer, OURS):
                    _repeat(layer, self.batch_size, n)
        forked.record = self.record.copy()
        if n > 1:
            forked.record.repeat(n)
        return forked

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Writes everything held to a safetensors file; see `hfkv.files.save_cache`."""
        from hfkv.files import save_cache

        save_cache(self, path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> KVCache:
        """Such a file as a cache for the model that filled it; see `hfkv.files.load_cache`."""
        from hfkv.files import load_cache

        return load_cache(path, model)

    def __deepcopy__(self, memo: Any) -> KVCache:
        return self.fork()

    def expect_copies(self, copies: int, tokens: int) -> None:
        """Says, before the first key, that rows of `tokens` will be copied: ``store="auto"`` takes pages then."""
        for layer in self.kv_layers:
            layer.expect_copies(copies, tokens)

    def reserve(self, tokens: int) -> None:
        """Says how many tokens a row will hold in all, so that memory is allocated once."""
        for layer in self.kv_layers:
            layer.reserve(tokens)

    def nbytes(self) -> int:
        """Bytes allocated: the sum over unique storages, layers of transformers' own included."""
        others = [layer for layer in self.layers if not isinstance(layer, OURS)]
        return sum(layer.nbytes() for layer in self.kv_layers) + storage_bytes(_tensors(others))

    def held_bytes(self) -> int:
        """Bytes of the tokens held, shared ones counted once."""
        others = [layer for layer in self.layers if not isinstance(layer, OURS)]
        return sum(layer.held_bytes() for layer in self.kv_layers) + storage_bytes(_tensors(others))

    @property
    def holds_tokens(self) -> torch.Tensor | None:
        """The ids of the tokens seen, int64 `[B, seen]` on the CPU, padding included.

        None where they are unknown: a cache only ever sees keys and values, and a patched model writes the tokens down.
        """
        if any(layer.is_assigned for layer in self.kv_layers):
            return None
        return self.record.tokens(self.get_seq_length())


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


def _probe(config_or_model: Any) -> Mapping[int, Rotary | None]:
    if not isinstance(config_or_model, torch.nn.Module):
        raise ValueError(
            'sink_positions="cache" and summaries need to know how the model rotates its keys: build the cache from '
            "the model itself, not from its config, or use hfkv.patch(model, kv=...)"
        )
    return probe_rotary(config_or_model)


def _replace(layer: Any, index: int, kv: KVConfig, known: Mapping[int, Rotary | None]) -> Any:
    """A layer of ours in place of a plain full or sliding one; any other layer as it is."""
    if type(layer) is DynamicSlidingWindowLayer:
        return KVLayer(kv, sliding=layer.sliding_window)
    if type(layer) is not DynamicLayer:
        return layer
    window = kv.window
    if isinstance(window, Window) and index in window.global_layers:
        return KVLayer(replace(kv, window=None))
    if isinstance(window, Window) and window.needs_rotary and index not in known:
        raise ValueError(f"`rotary` says nothing of layer {index}; leave it out, or give all that probe_rotary returns")
    rotary = known.get(index)
    if isinstance(window, Window) and index in window.global_heads:
        return SplitLayer(kv, window.global_heads[index], rotary)
    return KVLayer(kv, rotary=rotary)


def _repeat(layer: Any, batch: int | None, repeats: int) -> None:
    """Repeats every row of a layer; linear attention knows no repeating, but reordering."""
    if hasattr(layer, "batch_repeat_interleave"):
        layer.batch_repeat_interleave(repeats)
    elif batch is not None:
        layer.reorder_cache(torch.arange(batch).repeat_interleave(repeats))


def _tensors(layers: list[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else (value,)
            found += [tensor for tensor in values if isinstance(tensor, torch.Tensor)]
    return found
