"""`KVCache`: transformers' cache, with a `KVLayer` for every plain attention layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hfkv.build import OURS, build_layers, decoder_config
from hfkv.config import KVConfig
from hfkv.layer import KVLayer
from hfkv.record import TokenRecord
from hfkv.rotary import Rotary
from hfkv.split import SplitLayer
from hfkv.stores.base import storage_bytes


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
        config = decoder_config(config_or_model)
        self.kv = KVConfig.of(kv)
        if self.kv.reuse is not None:
            raise ValueError(
                "reuse is between the calls of a patched model, not of one cache: hfkv.patch(model, kv=...). Leave it "
                "out here (on a patched model, model.hfkv.new_cache() does), and share a prefix with cache.fork(n)"
            )
        self.model_type: str = config.model_type
        super().__init__(config=config)
        self.record = TokenRecord()
        self.layers: list[Any] = build_layers(self.layers, config_or_model, self.kv, rotary)

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
        forked.record = self.record.copy()
        if n > 1:
            forked.record.repeat(n)
            for layer in forked.layers:
                if not isinstance(layer, OURS):
                    _repeat(layer, self.batch_size, n)
        return forked

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Writes everything held to a safetensors file; see `hfkv.files.save_cache`.

        The last token that `generate` returns is not in the cache: it has not been read yet. The next prompt brings it.
        """
        from hfkv.files import save_cache

        save_cache(self, path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> KVCache:
        """Such a file as a cache for the model that filled it; see `hfkv.files.load_cache`.

        It knows its tokens; only a patched model goes on writing them down.
        """
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
        """Bytes allocated: the sum over unique storages, layers of transformers' own included.

        Forks that share pages share planes: each counts all of them.
        """
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
