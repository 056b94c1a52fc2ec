"""`ReadOnly`: tensors that show what a cache holds, and refuse writes that would not reach the cache."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_iter

from hfkv.models.proxy import Proxy

_WRITE = (
    "{} writes to the keys or values of an hfkv cache; the write would be lost. Edit a clone and assign it to the "
    "layer: values = layer.values.clone(), then layer.values = values (or keys)"
)


class ReadOnly(Proxy):
    """Tensor that reads as the one it stands for; writing to it, or to a view of it, raises.

    Raises:
        RuntimeError: something writes to it.
    """

    @property
    def takes_writes(self) -> bool:
        """Whether views of `plain()` are views of the cache's own planes, so that writes to them take effect."""
        return False

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        writes, views = _effects(func)
        if writes:
            _refuse_writes(func, args, kwargs or {})
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not views or not args or not isinstance(args[0], ReadOnly) or args[0].takes_writes:
            return result
        return Snapshot(result) if isinstance(result, torch.Tensor) else [Snapshot(part) for part in result]

    def __setitem__(self, index: Any, value: Any) -> None:
        # Torch would write to a slice of what is decoded.
        _refuse("__setitem__")

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _refuse("data =")

    def share_memory_(self, *args: Any) -> NoReturn:
        _refuse("share_memory_")

    def apply_(self, *args: Any) -> NoReturn:
        _refuse("apply_")

    def map_(self, *args: Any) -> NoReturn:
        _refuse("map_")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("the keys or values of an hfkv cache cannot be lent by DLPack: clone them first")


class Snapshot(ReadOnly):
    """Tensor of its own that shows a layer's keys or values as they were when they were read.

    Args:
        values: tensor to show; it has no gradients.
    """

    _shown: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Snapshot:
        # With a storage, so that code which asks for an address finds the numbers.
        snapshot = torch.Tensor._make_subclass(cls, values)
        snapshot._shown = values
        return snapshot

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self._shown)

    def plain(self) -> torch.Tensor:
        return self._shown


@functools.cache
def _effects(func: Any) -> tuple[bool, bool]:
    """Whether an operation writes to one of its arguments, and whether it returns views of its first one."""
    schema = func._schema
    aliases = (part.alias_info for part in schema.returns)
    return schema.is_mutable, any(alias is not None and not alias.is_write for alias in aliases)


def _refuse(what: Any) -> NoReturn:
    raise RuntimeError(_WRITE.format(what))


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        if any(isinstance(leaf, ReadOnly) for leaf in tree_iter(given)):
            _refuse(func)
