"""`ModuleMemory`: what the modules of a model hold besides their weights, to find out what a forward leaves in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, range)
# What every module has, weights and parts among it; and what others keep in modules for their own ends.
_NOT_STATE = (vars(nn.Module()).keys() - {"_buffers"}) | {"hfkv", "_hf_hook"}
_NOT_MODELS = ("accelerate", "bitsandbytes", "hfkv", "kernels")


class ModuleMemory:
    """Every tensor and container that the modules of a model hold at one moment, except weights.

    Plain numbers and strings are not state of a row: they may change.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._containers: list[tuple[str, Any, Any]] = []  # (whose, the container itself, its items then)
        self._tensors: dict[int, tuple[str, torch.Tensor, Any]] = {}
        self._seen: set[int] = set()
        self._look_at_modules(model)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self._tensors

    def changed(self) -> str | None:
        """Says where something is held now that was not then; None where nothing is."""
        for where, container, before in self._containers:
            if isinstance(container, dict):
                for name, value in _state_items(container):
                    if _differs(before.get(name), value):
                        return f"{where}.{name}"
                if any(name not in container and not _is_plain(value) for name, value in before.items()):
                    return where
            elif container != before if isinstance(container, set) else _differ(before, container):
                return where
        for where, tensor, version in self._tensors.values():
            now = _version(tensor)
            same = torch.equal(version, now) if isinstance(version, torch.Tensor) else version == now
            if not same:
                return where
        return None

    def restore(self) -> None:
        """Puts back what was held; the numbers of a tensor that was written to stay."""
        for _, container, before in self._containers:
            if isinstance(container, dict):
                for name in [name for name, _ in _state_items(container) if name not in before]:
                    del container[name]
                container.update(before)
            else:
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(before)

    def _look_at_modules(self, model: nn.Module) -> None:
        for module in model.modules():
            if id(module) not in self._seen:
                self._seen.add(id(module))
                self._open(type(module).__name__, vars(module), _NOT_STATE)

    def _open(self, where: str, container: Any, left_out: frozenset[str] | set[str] = frozenset()) -> None:
        items = container.copy()
        if isinstance(items, dict):
            items = {name: value for name, value in items.items() if name not in left_out}
        self._containers.append((where, container, items))
        for name, value in items.items() if isinstance(items, dict) else enumerate(items):
            self._look(f"{where}.{name}", value)

    def _look(self, where: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._look_at_modules(value)
        if _is_plain(value) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._tensors[id(value)] = (where, value, _version(value))
        elif isinstance(value, dict | list | set | deque):
            self._open(where, value)
        elif isinstance(value, tuple):
            for part in value:
                self._look(where, part)
        elif hasattr(value, "__dict__"):
            self._open(where, vars(value), _NOT_STATE)


def _state_items(container: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return ((name, value) for name, value in container.items() if name not in _NOT_STATE)


def _differ(old: Any, new: Any) -> bool:
    return len(old) != len(new) or any(map(_differs, old, new))


def _differs(old: Any, new: Any) -> bool:
    return new is not old and not (_is_plain(old) and _is_plain(new))


def _is_plain(value: Any) -> bool:
    """Whether a value can hold no state of a row: numbers, settings, code, and what libraries keep in modules."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, torch.Tensor | nn.Parameter):
        return isinstance(value, nn.Parameter)
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict | list | set | deque):
        return False
    return (
        callable(value)
        or isinstance(value, PreTrainedConfig | GenerationConfig)
        or type(value).__module__.split(".")[0] in _NOT_MODELS
    )


def _version(tensor: torch.Tensor) -> Any:
    """A mark that changes when a tensor is written to: a copy in inference mode, where torch counts no writes."""
    return tensor.detach().clone() if tensor.is_inference() else tensor._version
