"""`Undo`: a record of the attributes that a patch has set, and what they were before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hfkv.experts.stack import ExpertStack
from hfkv.patches.override import INNER, Override, does, is_override

logger = logging.getLogger("hfkv")

_ABSENT = "hfkv: the instance had no such attribute"
# Where accelerate's hooks keep the forward that they wrap.
_WRAPPED = "_old_forward"


class Undo:
    """Sets instance attributes and puts them back, newest first.

    It holds plain data, no closures: a deep copy of a patched model carries an undo of its own.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any, Any]] = []
        self._copies: list[tuple[Any, Any, dict[str, Any] | None]] = []
        self._parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._calls: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets ``owner.name = value``, and remembers what the instance had."""
        self._before.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def override(
        self, function: Callable[..., Any], owner: Any, name: str, given: tuple[Any, ...] = (), needs_patch: bool = True
    ) -> None:
        """Replaces a method of the owner's class by an `Override`."""
        self.set(owner, name, Override(function, owner, name, given, needs_patch))

    def override_forward(
        self, function: Callable[..., Any], module: Any, given: tuple[Any, ...] = (), needs_patch: bool = True
    ) -> None:
        """Replaces a module's forward by `function`, inside accelerate's hook where it has one.

        It stays there when the model is dispatched anew, or the hook taken off. A forward of the instance's own is
        `inner_forward` from then on.
        """
        name = _WRAPPED if _WRAPPED in vars(module) else "forward"
        inner = vars(module).get(name)
        if does(inner, function):  # left there by an earlier patch, under what others have wrapped around it
            return
        ours = Override(function, module, "forward", given, needs_patch)
        if inner is not None and getattr(inner, "__func__", None) is not type(module).forward:
            self._before.append((module, INNER, vars(module).get(INNER, _ABSENT), ours))
            setattr(module, INNER, inner)
        self.set(module, name, ours)

    @property
    def has_copies(self) -> bool:
        """Whether the model has copies of its configs already."""
        return bool(self._copies)

    def stand_in(self, copies: list[tuple[Any, Any]]) -> None:
        """Notes copies that replace originals: what their owner changes in them is carried back."""
        self._copies = [(original, copied, None) for original, copied in copies]

    def settle(self) -> None:
        """Says that whatever is in the copies now was set by the patch, and not by the model's owner."""
        self._copies = [(original, copied, dict(vars(copied))) for original, copied, _ in self._copies]

    def set_parameter(self, module: nn.Module, name: str, value: nn.Parameter) -> None:
        """Replaces a parameter by `value`; its own numbers are not kept."""
        original = module._parameters[name]
        assert original is not None
        self._parameters.append((module, name, original))
        module._parameters[name] = value
        if not hasattr(original, "device_mesh") and original.device.type != "meta":
            original.data = original.new_empty(0)

    def call(self, function: Callable[[], None]) -> None:
        """Registers `function` to be called when everything is put back, after the parameters."""
        self._calls.append(function)

    def restore(self) -> None:
        """Puts everything back; a parameter's numbers are those that stand in its place now."""
        lossy = {_restore_parameter(*self._parameters.pop()) for _ in range(len(self._parameters))} - {None}
        while self._calls:
            self._calls.pop()()
        for form in sorted(filter(None, lossy)):
            logger.warning("what is back of weights that were %s are their decoded numbers, not those before", form)
        while self._before:
            owner, name, value, ours = self._before.pop()
            if name in ("forward", _WRAPPED):
                _restore_forward(owner, value, ours)
            elif name == INNER and does(vars(owner).get("forward"), ours.function):
                continue  # still needed under what others have wrapped around it
            elif name != INNER and isinstance(ours, Override) and not is_override(vars(owner).get(name), ours):
                continue  # its owner has taken it off, or others have wrapped it: it does what the class's own does
            elif isinstance(value, str) and value == _ABSENT:
                if name in vars(owner):  # unless its owner has taken it off
                    delattr(owner, name)
            else:
                setattr(owner, name, value)
        while self._copies:
            original, copied, at_first = self._copies.pop()
            if at_first is None:
                continue  # the patch did not come to its end
            for name, value in vars(copied).items():
                # A part of the config is compared by identity: it has a copy, and an entry, of its own.
                before = at_first.get(name, _ABSENT)
                if before is not value and (isinstance(value, PreTrainedConfig) or before != value):
                    vars(original)[name] = value


def _restore_parameter(module: nn.Module, name: str, original: nn.Parameter) -> str | None:
    """Returns the form that the parameter was in, if it lost something in it."""
    now = module._parameters.get(name)
    if not isinstance(now, ExpertStack):
        return None
    if original.device.type == "meta":  # accelerate has its numbers
        module._parameters[name] = original
        return None
    lossy = now.weights.form if now.weights.is_lossy else None
    plain = now.plain()
    if hasattr(original, "device_mesh"):
        # A shard's numbers cannot be put into the object that held them.
        from torch.distributed.tensor import DTensor

        shard = DTensor.from_local(plain, original.device_mesh, original.placements, run_check=False)
        module._parameters[name] = nn.Parameter(shard, requires_grad=now.requires_grad)
        return lossy
    original.data = plain
    original.requires_grad_(now.requires_grad)
    module._parameters[name] = original
    return lossy


def _restore_forward(module: Any, value: Any, ours: Override) -> None:
    """Takes our forward out of where it is now: accelerate may have wrapped or unwrapped it since."""
    for name in ("forward", _WRAPPED):
        if not is_override(vars(module).get(name), ours):
            continue
        if not (isinstance(value, str) and value == _ABSENT):
            setattr(module, name, value)
        elif name == "forward":
            delattr(module, name)
        else:
            setattr(module, name, MethodType(type(module).forward, module))
