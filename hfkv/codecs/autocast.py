"""Guards against the caller's `torch.autocast`, which is for the model's own operations and not for hfkv's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
_AS_IT_IS: AbstractContextManager[object] = nullcontext()


def is_on() -> bool:
    """Whether autocast is on, for any kind of device."""
    return torch._C._is_any_autocast_enabled()  # 0.2 us; to ask for one device by name takes 0.3


def own_precision() -> AbstractContextManager[object]:
    """Switches autocast off: within the context, operations compute in the dtypes of their arguments.

    Autocast would round the factors of every product, and `torch.cat` refuses half-precision numbers of another dtype
    than its own; hfkv's codes, scales and sums are in the dtype that they need.
    """
    if not is_on():
        return _AS_IT_IS
    stack = ExitStack()
    for device_type in _DEVICE_TYPES:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps `function` so that it always runs under `own_precision`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not is_on():
            return function(*args, **kwargs)
        with own_precision():
            return function(*args, **kwargs)

    return run


def product_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype of a product of `states`: their own, or the one that the caller's autocast chooses."""
    if not is_on() or states.dtype == torch.float64:
        return states.dtype
    device_type = states.device.type
    if device_type not in _DEVICE_TYPES or not torch.is_autocast_enabled(device_type):
        return states.dtype
    return torch.get_autocast_dtype(device_type)
