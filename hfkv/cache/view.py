"""`KVView`: the tensor that a cache layer returns, which stands for compressed keys or values."""

from __future__ import annotations

from sys import getrefcount
from typing import Any, NamedTuple
from weakref import getweakrefcount

import torch

from hfkv.cache.read_only import ReadOnly
from hfkv.cache.snapshot import HeldTokens, Part, Tokens
from hfkv.cache.step import Group, Step
from hfkv.codecs.key_mean import KeyMean
from hfkv.models.padding import LeftPadding
from hfkv.models.rotary import Rotary
from hfkv.stores import Store


class KVView(ReadOnly):
    """Keys or values `[B, H, T, D]` of one layer, decoded when they are read.

    The ``hfkv`` attention reads the tokens behind it. Any other code sees an ordinary tensor: every torch
    operation decodes it first. Its length is fixed when it is made; it may be read several times until the
    layer drops, reorders or resets tokens. Writing to it raises; so does writing to a slice of it, unless that is a
    slice of the cache's own planes, so that the write takes effect.

    Raises:
        RuntimeError: an operation outside the ``hfkv`` attention reads it where a window is set (no other
            attention knows which of the tokens to attend to), something writes to it, or a backward pass reaches it.
    """

    held: Tokens
    part: Part

    @staticmethod
    def __new__(cls, held: Tokens, part: Part) -> KVView:
        # Torch picks its way by strides before it asks for the values: they must be those of what is decoded.
        size, strides, offset, dtype = ViewShape.of(held, part)
        view = new_wrapper(cls, size, strides, offset, None, dtype, torch.strided, held.device)
        view.held, view.part = held, part
        return view

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"KVView({self.part}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def takes_writes(self) -> bool:
        if not isinstance(self.held, HeldTokens) or not self.held.is_slice_of(self.part):
            return False
        return self.held.decode(self.part).stride() == self.stride()  # else `plain` is a copy

    def plain(self) -> torch.Tensor:
        """Decodes the tokens, for code that knows nothing of windows."""
        refuse_window(self.held)
        decoded = self.held.decode(self.part)
        return decoded if decoded.stride() == self.stride() else decoded.contiguous()

    def decoded(self) -> torch.Tensor:
        """Decodes the tokens, for code that applies the window itself."""
        if self.requires_grad:
            return _DecodeView.apply(self)
        return self.held.decode(self.part)


class ViewShape(NamedTuple):
    """Size `[B, H, T, D]`, strides, storage offset and dtype of the tensor that keys or values are shown as."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, held: Tokens, part: Part) -> ViewShape:
        """The shape of the tensor that `decode` returns."""
        return cls(held.shape(part), *held.layout(part), held.parts[part].dtype)


class StepKeys(KVView):
    """The keys of a layer that belong to a `Step`."""

    held: HeldTokens
    part = "key"


class StepValues(KVView):
    """The values of a layer that belong to a `Step`."""

    held: HeldTokens
    part = "value"


new_wrapper: Any = torch.Tensor._make_wrapper_subclass


def step_views(held: HeldTokens, step: Step) -> tuple[StepKeys, StepValues]:
    """Views of what a step shows, whose shapes are known already."""
    size, strides, offset, dtype = step.keys
    key = new_wrapper(StepKeys, size, strides, offset, None, dtype, torch.strided, held.device)
    size, strides, offset, dtype = step.values
    value = new_wrapper(StepValues, size, strides, offset, None, dtype, torch.strided, held.device)
    key.held = value.held = held
    return key, value


def same_views(
    group: Group, step: Step, store: Store, padding: LeftPadding, rotary: Rotary | None, mean: KeyMean | None
) -> Any:
    """The views that the layer before was given, for the next one; None where they are others, or somebody has them.

    A model drops a layer's keys and values before it comes to the next layer, so that one pair serves them all.
    """
    shown = group.shown
    if shown is None:
        return None
    key, value, held = shown
    # References: the tuple, the name here and the argument; each view has its tokens besides.
    is_free = getrefcount(key) == getrefcount(value) == 3 and getrefcount(held) == 5
    if not is_free or held.step is not step or getweakrefcount(key) or getweakrefcount(value):
        return None
    held.store, held.padding, held.rotary, held.version = store, padding, rotary, store.version
    held.mean = mean
    return key, value


def refuse_window(held: Tokens) -> None:
    """Raises RuntimeError where an attention that knows nothing of hfkv's windows would read tokens under one."""
    if held.is_windowed:
        raise RuntimeError(
            "a windowed hfkv cache was read by an attention that does not know the window: its result would be "
            "wrong. Use hfkv.patch(model, kv=...) or, where another attention was set since, "
            'model.set_attn_implementation("hfkv"); a model that cannot '
            "take that attention, or that changes its keys between the cache and the attention, can have a cache "
            "without a window only"
        )


def make_views(held: Tokens, tracked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and value views of `held`.

    Args:
        held: tokens that the views show.
        tracked: whether autograd follows some of the keys or values.
    """
    parts: tuple[Part, Part] = ("key", "value")
    if not tracked or not torch.is_grad_enabled():
        key, value = (KVView(held, part) for part in parts)
    else:
        key, value = (_InferenceOnly.apply(torch.zeros((), requires_grad=True), held, part) for part in parts)
    return key, value


class _InferenceOnly(torch.autograd.Function):
    """Lets a forward pass run with gradients enabled and refuses the backward pass through the cache."""

    @staticmethod
    def forward(ctx: Any, tracked: torch.Tensor, held: Tokens, part: Part) -> torch.Tensor:
        return KVView(held, part)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "gradients do not flow through an hfkv cache; train without past_key_values (use_cache=False) or "
            "with transformers' DynamicCache"
        )


class _DecodeView(torch.autograd.Function):
    """Decodes with the autograd edge that leads to `_InferenceOnly` kept."""

    @staticmethod
    def forward(ctx: Any, view: KVView) -> torch.Tensor:
        return view.held.decode(view.part)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0]
