"""A record of the attributes a patch set, and of what they were."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from transformers import PreTrainedConfig

_ABSENT = "hfkv: the instance had no such attribute"
# Where accelerate's hooks keep the forward that they wrap.
_WRAPPED = "_old_forward"


class Undo:
    """Sets instance attributes and puts them back, newest first.

    It holds plain data, no closures: a deep copy of a patched model carries an undo of its own.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any, Any]] = []
        self._copies: list[tuple[Any, Any, dict[str, Any]]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, remembering what the instance had."""
        self._before.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def set_forward(self, module: Any, wrap: Callable[[Any], Any]) -> None:
        """Puts ``wrap(forward)`` in place of a module's forward, inside the hook of accelerate's where it has one.

        There it stays when the model is dispatched anew, or the hook taken off.
        """
        name = _WRAPPED if _WRAPPED in vars(module) else "forward"
        self.set(module, name, wrap(getattr(module, name)))

    def stands_in(self, original: Any, copied: Any) -> None:
        """Notes that `copied` is used in place of `original`: what its owner changes in it is carried back."""
        self._copies.append((original, copied, dict(vars(copied))))

    def restore(self) -> None:
        """Puts everything back."""
        while self._before:
            owner, name, value, ours = self._before.pop()
            if name in ("forward", _WRAPPED):
                _restore_forward(owner, value, ours)
            elif isinstance(value, str) and value == _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        while self._copies:
            original, copied, at_first = self._copies.pop()
            for name, value in vars(copied).items():
                # A part of the config is compared by identity: it has a copy, and an entry, of its own.
                before = at_first.get(name, _ABSENT)
                if before is not value and (isinstance(value, PreTrainedConfig) or before != value):
                    vars(original)[name] = value


def _restore_forward(module: Any, value: Any, ours: Any) -> None:
    """Takes our forward out from where it is now: accelerate may have wrapped or unwrapped it since."""
    for name in ("forward", _WRAPPED):
        if vars(module).get(name) is not ours:
            continue
        if not (isinstance(value, str) and value == _ABSENT):
            setattr(module, name, value)
        elif name == "forward":
            delattr(module, name)
        else:
            setattr(module, name, MethodType(type(module).forward, module))
