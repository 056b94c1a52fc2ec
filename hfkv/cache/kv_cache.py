"""`KVCache`: transformers' cache, with a `KVLayer` for every plain attention layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from hfkv.cache.factory import build_layers, decoder_config
from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.memory import CacheMemory, PlaneMemory
from hfkv.cache.record import TokenRecord, what_failed
from hfkv.cache.selection import choose_rows, reordered, repeated, selected
from hfkv.cache.step import Group
from hfkv.codecs.key_mean import KeyMean
from hfkv.measure.allocated import count_as_live, own_tensors, storage_bytes
from hfkv.models.rotary import Rotary
from hfkv.policy.config import KVConfig
from hfkv.policy.errors import CacheMemoryError
from hfkv.policy.ports import port
from hfkv.stores import Budget, Offload


class KVCache(DynamicCache):
    """KV cache made of three policies; goes into ``model.generate(past_key_values=...)`` or a forward call.

    Layers of the model with their own sliding window keep it. Linear-attention, indexed and dummy layers and
    cross-attention stay transformers' own.

    Args:
        config_or_model: model, or its config. ``sink_positions="cache"`` and summaries need the model: how it
            rotates its keys is found out by a forward pass over a few tokens.
        kv: `KVConfig`, its string form, or None: lossless.
        rotary: result of `probe_rotary` for the model, by layer, if it is known already.
        key_means: means of keys, by layer, taken off before few bits write them; None for those of a patched model.

    Raises:
        TypeError: the first argument is neither a model nor a config (DataParallel rebuilds caches from data: use DDP).
        ValueError: the model has no layer this can hold, or `kv` does not fit its layers, or asks
            for reuse.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        count_as_live(self)
        return self

    def __init__(
        self,
        config_or_model: Any,
        kv: KVConfig | str | None = None,
        rotary: Mapping[int, Rotary | None] | None = None,
        key_means: Mapping[int, KeyMean] | None = None,
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
        self.layers: list[Any] = build_layers(self.layers, config_or_model, self.kv, rotary, key_means)
        self.takes_mean = any(layer.takes_mean for layer in self.kv_layers)
        self.offload = self._share_offload()
        self._group_layers(lambda leaf: (leaf.kv, leaf.sliding))

    @property
    def kv_layers(self) -> list[CacheLayer]:
        """The layers that are hfkv's own."""
        return [layer for layer in self.layers if isinstance(layer, CacheLayer)]

    @property
    def leaves(self) -> list[KVLayer]:
        """The `KVLayer`s of all hfkv layers; a layer split by heads has two."""
        return [leaf for layer in self.kv_layers for leaf in layer.leaves]

    def _group_layers(self, kind_of: Callable[[KVLayer], object]) -> None:
        """Lets layers of the same kind do their steps together."""
        groups: dict[object, Group] = {}
        for leaf in self.leaves:
            leaf.group = groups.setdefault(kind_of(leaf), Group())

    def _share_offload(self, budget: Budget | None = None) -> Offload | None:
        """Gives the offloaded layers one budget, and buffers in common; returns None where no layer is offloaded."""
        offloaded = [leaf for leaf in self.leaves if leaf.kv.offload]
        if not offloaded:
            return None
        num_bytes = None if self.kv.device_budget is None else int(self.kv.device_budget)
        offload = Offload(budget or Budget(num_bytes, [leaf.bound for leaf in offloaded]))
        for index, leaf in enumerate(offloaded):
            leaf.offload_to(offload.place(index))
        return offload

    @property
    def batch_size(self) -> int | None:
        """The number of rows held; None before the first key."""
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
        if self.record.broken is not None:
            self.record.check_whole()
        try:  # transformers' own would look for layers to make and to offload
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        except (MemoryError, torch.OutOfMemoryError, ValueError) as error:
            layer = self.layers[layer_idx]
            parts = layer.leaves if isinstance(layer, CacheLayer) else (layer,)
            is_whole = self.take_back(min(part.get_seq_length() for part in parts))
            if not is_whole:
                self.record.broken = what_failed(error)
            if isinstance(error, ValueError) or not is_whole:
                raise
            raise CacheMemoryError.of(error, self) from error

    def take_back(self, left: int) -> bool:
        """Takes back the tokens of a forward that failed, so that every layer has seen `left` tokens.

        Returns:
            Whether that was possible: transformers' own layers cannot go back.
        """
        if any(True for _ in self._own_tensors()):
            return False
        ahead = [leaf for leaf in self.leaves if leaf.get_seq_length() > left]
        try:
            for name in ("check_crop", "crop"):  # all of them can, or none does
                for leaf in ahead:
                    getattr(leaf, name)(left - leaf.get_seq_length())
        except (RuntimeError, MemoryError):
            return False
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen, padding included."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if type(layer) is KVLayer and layer.is_initialized:  # nearly always
            return layer.span.seen
        return super().get_seq_length(self._filled(layer_idx) if layer_idx == 0 else layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The length and offset of the keys that a layer's mask is made for."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if type(layer) is KVLayer and layer.is_initialized:  # nearly always
            return layer.get_mask_sizes(query_length)
        # A sliding layer holds fewer keys than a full one.
        kind = self.is_sliding[layer_idx] if layer_idx < len(self.layers) else None
        return super().get_mask_sizes(query_length, self._filled(layer_idx, kind))

    def _filled(self, first: int, kind: bool | None = None) -> int:
        """The first layer from `first` on that holds something, or `first`: a stage of a pipeline fills only its own.

        Args:
            first: index of a layer.
            kind: whether the layer must slide; None for either.
        """
        filled = (
            index
            for index, layer in enumerate(self.layers[first:], first)
            if isinstance(layer, CacheLayerMixin) and layer.is_initialized
            if kind in (None, getattr(layer, "is_sliding", False))
        )
        return next(filled, first)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens from every layer, or from none where one of hfkv's cannot."""
        ours = self.kv_layers
        for layer in ours:
            layer.check_crop(tokens_to_remove)
        with self.record.changing():
            for layer in (*(layer for layer in self.layers if layer not in ours), *ours):  # others may refuse too
                layer.crop(tokens_to_remove)
        if self.get_seq_length():
            self.record.crop(self.get_seq_length())
        else:
            self.record.forget()
            for leaf in self.leaves:
                leaf.is_assigned = False

    def reset(self) -> None:
        """Forgets everything; another batch, model or adapter may follow."""
        super().reset()
        self.record.forget()
        if self.offload is not None:
            self.offload.restart()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes row i a copy of row `beam_idx[i]`."""
        with self.record.changing():
            super().reorder_cache(beam_idx)
        self.record.choose(reordered, beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps the rows `indices`; see `hfkv.cache.selection.selected`."""
        self._choose("batch_select_indices", selected, indices)
        self.record.choose(selected, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; pages are shared until they are written to."""
        self._choose("batch_repeat_interleave", repeated, repeats)
        self.record.choose(repeated, repeats)

    def _choose(self, name: str, choose: Callable[[Any, int], torch.Tensor], given: Any) -> None:
        with self.record.changing():
            for layer in self.layers:
                choose_rows(layer, name, choose, given)

    def fork(self, n: int = 1) -> KVCache:
        """Copies the cache: the copy goes on by itself and holds every row `n` times, row after row.

        Pages are shared until they are written to: with ``store="paged"`` only the last, partly filled page is ever
        copied. ``"auto"`` puts a prefix of some length into pages when `n` is more than 1; ``"contiguous"`` copies all.

        Args:
            n: number of copies of each row: of questions, beams or samples that continue a prefix.

        Raises:
            TypeError, ValueError: `n` is not a whole number of at least 1.
        """
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"cache.fork takes a number of copies, got {n!r}")
        if n < 1:
            raise ValueError(f"cache.fork takes a number of copies of at least 1, got {n}")
        forked = copy.copy(self)
        forked.layers = [
            layer.fork(n) if isinstance(layer, CacheLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        forked.record = self.record.copy()
        forked._group_layers(lambda leaf: leaf.group)  # another's as yet
        forked.offload = forked._share_offload(None if self.offload is None else self.offload.budget)
        if n > 1:
            forked.record.choose(repeated, n)
            for layer in forked.layers:
                if not isinstance(layer, CacheLayer):
                    choose_rows(layer, "batch_repeat_interleave", repeated, n)
        return forked

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Writes the whole cache to a safetensors file; see `hfkv.sharing.files.cache_file.save_cache`.

        The last token that `generate` returns is not in the cache: it has not been read yet. The next prompt brings it.
        """
        port("save_cache")(self, path, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> KVCache:
        """Loads a saved file as a cache for the model that filled it; see `hfkv.sharing.files.cache_file.load_cache`.

        The cache knows its tokens; only a patched model goes on recording them.
        """
        return port("load_cache")(path, model)

    def __deepcopy__(self, memo: Any) -> KVCache:
        return self.fork()

    def expect_copies(self, copies: int, tokens: int) -> None:
        """Announces, before the first key, copies of rows of `tokens`: ``store="auto"`` takes pages for long ones."""
        for layer in self.kv_layers:
            layer.expect_copies(copies, tokens)

    def reserve(self, tokens: int) -> None:
        """Says how many tokens a row will hold in all, so that memory is allocated once."""
        if self.offload is not None:
            self.offload.budget.divide_anew()
        for layer in self.kv_layers:
            layer.reserve(tokens)

    def nbytes(self) -> int:
        """Bytes allocated: the sum over unique storages, transformers' own layers included.

        Forks that share pages share planes: each counts all of them. The buffers that offloaded pages pass through
        count too.
        """
        buffers = 0 if self.offload is None else sum(self.offload.buffer_bytes().values())
        return sum(layer.nbytes() for layer in self.kv_layers) + self._own_bytes() + buffers

    def held_bytes(self) -> int:
        """Bytes of the tokens held, shared ones counted once."""
        return sum(layer.held_bytes() for layer in self.kv_layers) + self._own_bytes()

    def memory(self) -> CacheMemory:
        """The parts of `nbytes` and `held_bytes`: bytes by layer, plane and device, as a table when printed."""
        buffers = {} if self.offload is None else self.offload.buffer_bytes()
        shared = [
            PlaneMemory(None, "state", "staging buffers", device, num_bytes, 0)
            for device, num_bytes in buffers.items()
            if num_bytes
        ]
        return CacheMemory.of(self.layers, shared)

    def _own_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors of transformers' own layers."""
        others = (layer for layer in self.layers if not isinstance(layer, CacheLayer))
        return (tensor for layer in others for _, tensor in own_tensors(layer))

    def _own_bytes(self) -> int:
        return storage_bytes(self._own_tensors())

    @property
    def holds_tokens(self) -> torch.Tensor | None:
        """The ids of the tokens seen, int64 `[B, seen]` on the CPU, padding included.

        None where they are unknown: a cache only ever sees keys and values, and a patched model records the tokens.
        """
        if any(layer.is_assigned for layer in self.kv_layers):
            return None
        return self.record.tokens(self.get_seq_length())
