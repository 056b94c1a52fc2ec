"""`KVView`: what a cache layer returns, a tensor that stands for compressed keys or values."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch.utils._pytree import tree_iter, tree_map_only

Part = Literal["key", "value"]


class Snapshot(Protocol):
    """What a layer held when its views were made."""

    is_windowed: bool

    def shape(self, part: Part) -> tuple[int, int, int, int]: ...

    def decode(self, part: Part) -> torch.Tensor: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


class KVView(torch.Tensor):
    """Keys or values `[B, H, T, D]` of one layer, decoded when they are read.

    The ``hfkv`` attention reads the snapshot behind it. Any other code sees an ordinary tensor: every torch
    operation decodes it first. Its length is fixed when it is made; it may be read several times until the
    layer drops, reorders or resets tokens. Writing to it raises.

    Raises:
        RuntimeError: on an operation outside the ``hfkv`` attention where a window is set (no other
            attention knows which of the tokens to attend to), on a write, on a backward pass.
    """

    snapshot: Snapshot
    part: Part

    @staticmethod
    def __new__(cls, snapshot: Snapshot, part: Part) -> KVView:
        view = torch.Tensor._make_wrapper_subclass(
            cls, snapshot.shape(part), dtype=snapshot.dtype, device=snapshot.device, requires_grad=False
        )
        view.snapshot, view.part = snapshot, part
        return view

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"KVView({self.part}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(KVView, _decode_for_others, (args, kwargs))
        return func(*args, **kwargs)

    def decoded(self) -> torch.Tensor:
        """The plain tensor, for code that applies the window itself."""
        if self.requires_grad:
            return torch.ops.aten.alias.default(self)  # keeps the autograd edge that refuses a backward pass
        return self.snapshot.decode(self.part)


def make_views(
    snapshot: Snapshot, key_states: torch.Tensor, value_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and value views of `snapshot`; `key_states`, `value_states` are what the model just computed."""
    parts: tuple[tuple[Part, torch.Tensor], ...] = (("key", key_states), ("value", value_states))
    key, value = (
        _InferenceOnly.apply(states, snapshot, part)
        if torch.is_grad_enabled() and states.requires_grad
        else KVView(snapshot, part)
        for part, states in parts
    )
    return key, value


class _InferenceOnly(torch.autograd.Function):
    """Lets a forward pass run with gradients enabled and refuses the backward pass through the cache."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, snapshot: Snapshot, part: Part) -> torch.Tensor:
        return KVView(snapshot, part)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "gradients do not flow through an hfkv cache; train without past_key_values (use_cache=False) or "
            "with transformers' DynamicCache"
        )


def _decode_for_others(view: KVView) -> torch.Tensor:
    if view.snapshot.is_windowed:
        raise RuntimeError(
            "a windowed hfkv cache was read by an attention that does not know the window: its result would be "
            'wrong. Use hfkv.patch(model, kv=...) or model.set_attn_implementation("hfkv"); a model that cannot '
            "take that attention cannot have a window (window=None)"
        )
    return view.snapshot.decode(view.part)


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        if any(isinstance(leaf, KVView) for leaf in tree_iter(given)):
            raise RuntimeError(
                f"{func} writes to the keys or values of an hfkv cache; the write would be lost. "
                "Clone them first, or assign to layer.keys / layer.values"
            )
