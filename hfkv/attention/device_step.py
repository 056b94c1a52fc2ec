"""`DeviceStep`: a cache's decode step with everything that changes between steps in tensors, for CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hfkv.attention.window_blocks import WindowBlocks
from hfkv.attention.windowed import visibility_of
from hfkv.cache.kv_cache import KVCache
from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.snapshot import Captured
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.dispatch import append_kernel, attention_kernel, latent_kernel
from hfkv.kernels.inputs import Visibility
from hfkv.models.latents import widths_of
from hfkv.stores.layout import Layout

# Columns of a block table beyond those reserved; where they run out, a step is captured anew.
SPARE_COLUMNS = 16


def step_reason(cache: KVCache, mask: torch.Tensor | None, config: Any) -> str | None:
    """Why the decode step of `cache` cannot be a `DeviceStep`, in words, or None where it can.

    Args:
        cache: a cache after its prefill.
        mask: the attention mask of the step, `[B, seen]`, or None.
        config: the config of the model's text decoder: a layer does not know whether its keys are latents.
    """
    for index, layer in enumerate(cache.layers):
        name = f"layer {index}"
        if not isinstance(layer, CacheLayer):
            return f"{name} is a {type(layer).__name__}"
        refusal = layer.graph_refusal()
        if refusal is not None:
            return f"{name} {refusal}"
        (layer,) = layer.leaves
        attend = attention_kernel if widths_of(config, index) is None else latent_kernel
        is_innermost = bool(layer.store.tokens_innermost)
        kernels = (
            append_kernel(layer.kv.codec, layer.dtype, layer.device, layer.head_dims, is_innermost),
            attend(layer.kv.codec, layer.dtype, layer.device, 1, layer.head_dims, is_innermost),
        )
        for kernel in kernels:
            if not kernel.reads_device_lengths:
                return f"{name} has no kernel that reads lengths from the device ({kernel.name}: {kernel.reason})"
        if layer.window is not None and not layer.is_sliding:
            if WindowBlocks(layer.held(), layer.span.padding.of(1)).has_more_than_tokens:
                return f"{name} has a window with turned sinks or summaries"
            if mask is not None:
                return f"{name} has a window, and the batch is padded"
    return None


def advance(cache: KVCache) -> list[Layout]:
    """Makes room for one more token in every layer and counts it as seen; returns where those before it lie."""
    return [layer.step() for layer in cache.layers]


@dataclass
class _AlikeLayers:
    """Layers that hold the same tokens in the same places: one upload serves them all."""

    indices: list[int]  # among the layers of the cache
    before: Layout
    written: DeviceInputs
    seen: DeviceInputs


class DeviceStep:
    """One decode step of layers that have been advanced, and the steps that follow it.

    Args:
        layers: the layers of a cache for which `step_reason` finds nothing.
        befores: what `advance` returned.
        mask: the attention mask of the step, `[B, seen]`, or None.
    """

    def __init__(self, layers: list[KVLayer], befores: list[Layout], mask: torch.Tensor | None) -> None:
        self.layers = layers
        self.groups: list[_AlikeLayers] = []
        for index, (layer, before) in enumerate(zip(layers, befores, strict=True)):
            layer.store.keeps_place = True
            group = next((group for group in self.groups if _alike(layers[group.indices[0]], layer)), None)
            if group is None:
                self.groups.append(_group(index, layer, before, mask))
            else:
                group.indices.append(index)
        self._num_layers = len(layers)
        self._places = self._places_now()

    def update(self, befores: list[Layout], mask: torch.Tensor | None) -> bool:
        """Tells the device of the next step.

        Args:
            befores, mask: the same of that step.

        Returns:
            False where what has been captured cannot be replayed: planes have moved, or the numbers no longer fit.
        """
        if self._places != self._places_now():
            return False
        for group in self.groups:
            first, *others = group.indices
            head = self.layers[first]
            if not all(_alike(head, self.layers[other]) for other in others):
                return False
            try:
                group.written.update(befores[first], None)
                group.seen.update(head.store.layout(), _visibility(head, mask))
            except ValueError:
                return False
        return True

    def release(self) -> None:
        """Lets go of the layers, whose cache is gone; `adopt` gives others."""
        self.layers = []

    def adopt(self, layers: list[KVLayer]) -> bool:
        """Goes on with the layers of another cache of the same kind, after its prompt.

        Returns:
            Whether their planes are those that were captured.
        """
        if len(layers) != self._num_layers or not all(layer.is_initialized for layer in layers):
            return False
        self.layers = layers
        for layer in layers:
            layer.store.keeps_place = True
        return self._places == self._places_now()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Makes the layers write and read where the device says, while the context lasts."""
        for group in self.groups:
            for layer in [self.layers[index] for index in group.indices]:
                is_innermost = bool(layer.store.tokens_innermost)
                kernel = append_kernel(layer.kv.codec, layer.dtype, layer.device, layer.head_dims, is_innermost).run
                assert kernel is not None
                layer.captured = Captured(kernel, group.before, group.written, group.seen)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.captured = None

    def _places_now(self) -> list[tuple[int, torch.Size]]:
        return [(plane.data_ptr(), plane.shape) for layer in self.layers for plane in layer.store.planes]


def _alike(one: KVLayer, other: KVLayer) -> bool:
    if one is other:
        return True
    first, second = one.store.layout(), other.store.layout()
    if (one.window, one.sliding, one.span.gone_below) != (other.window, other.sliding, other.span.gone_below):
        return False
    if first is second:  # of one block table
        return True
    if (first.length, first.start, first.spans, first.is_paged) != (
        *(second.length, second.start, second.spans, second.is_paged),
    ):
        return False
    return first.table is None or (second.table is not None and torch.equal(first.table, second.table))


def _group(index: int, layer: KVLayer, before: Layout, mask: torch.Tensor | None) -> _AlikeLayers:
    columns, tokens = 0, layer.store.planes[0].shape[2]
    if before.is_paged:
        columns = max(-(-layer.store.reserved // tokens), len(before.spans) + 1) + SPARE_COLUMNS
        tokens *= columns
    written = DeviceInputs.allocate(before, None, layer.device, columns=columns)
    seen = DeviceInputs.allocate(
        layer.store.layout(), _visibility(layer, mask), layer.device, columns=columns, tokens=tokens
    )
    return _AlikeLayers([index], before, written, seen)


def _visibility(layer: KVLayer, mask: torch.Tensor | None) -> Visibility:
    """What the query of the newest token sees."""
    held = layer.held()
    if layer.window is not None and not layer.is_sliding:
        return visibility_of(WindowBlocks(held, layer.span.padding.of(held.batch)), 1)
    # Of a sliding layer of the model's own, the newest tokens.
    first = held.first if layer.sliding is None else max(held.last - layer.sliding, 0)
    if mask is not None:
        mask = mask[:, None, None, mask.shape[1] - (held.last - first) :] != 0
    return Visibility(seen=held.last, pads=(0,) * held.batch, first=first, mask=mask)
