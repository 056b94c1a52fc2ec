"""Weights that accelerate has put away: where they are, without bringing them back."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from hfkv.models.mapped_file import DTYPES, MappedFile, map_bytes


class AtRest(NamedTuple):
    """A weight whose parameter is on meta.

    Attributes:
        tensor: its numbers, in host memory or mapped from a file to be read only.
        dtype: the dtype in which they are brought back.
        path: the file; None for host memory.
    """

    tensor: torch.Tensor
    dtype: torch.dtype
    path: str | None


def at_rest(module: nn.Module, name: str) -> AtRest:
    """The weight that accelerate would bring back for a parameter on meta.

    Raises:
        ValueError: its numbers are not known.
    """
    for hook in hooks_of(module):
        weights = getattr(hook, "weights_map", None)
        if weights is None or name not in weights:
            continue
        loader, key = getattr(weights, "dataset", weights), getattr(weights, "prefix", "") + name
        if key in getattr(loader, "index", {}) and key not in getattr(loader, "state_dict", {}):
            return _on_disk(loader, key)
        tensor = weights[name]
        return AtRest(tensor, tensor.dtype, None)
    raise ValueError(
        f"{name} of {type(module).__name__} is on meta, and no hook of accelerate's has its numbers; load the model "
        'with from_pretrained(..., device_map=...), experts mapped to "cpu" or "disk"'
    )


def _on_disk(loader: Any, key: str) -> AtRest:
    """The loader's own tensors are copies in memory of all experts: here the file is mapped."""
    entry = loader.index[key]
    path = entry.get("safetensors_file")
    if path is not None:
        tensor = MappedFile(path).tensor(entry.get("weight_name", key))
        return AtRest(tensor, getattr(torch, entry.get("dtype", ""), tensor.dtype), path)
    path = os.path.join(loader.save_folder, f"{key}.dat")
    dtype = getattr(torch, entry["dtype"])
    if dtype not in DTYPES.values():
        raise ValueError(f"{key} is {dtype} in {path!r}; experts are bfloat16, float16 or float32")
    return AtRest(map_bytes(path).view(dtype).view(entry["shape"]), dtype, path)


def execution_device(module: nn.Module) -> torch.device:
    """The device on which accelerate computes with a module whose weights it has put away."""
    for hook in hooks_of(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(f"{type(module).__name__} is on meta, and no hook of accelerate's says where it is computed")


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,))) if hook is not None else ()


def bring_no_more(module: nn.Module, *names: str) -> Callable[[], None]:
    """Keeps accelerate from bringing the weights of a module back: its other parameters stay on the device from now on.

    Args:
        module: the module, with an `AlignDevicesHook` or without.
        names: the names of the parameters that are provided otherwise.

    Returns:
        A function that puts everything except `names` back as it was.
    """
    changed = [hook for hook in hooks_of(module) if getattr(hook, "offload", False)]
    before = {}
    for name, parameter in module._parameters.items():
        if changed and parameter is not None and name not in names and parameter.device.type == "meta":
            before[name] = parameter
            found = at_rest(module, name)
            brought = found.tensor.to(execution_device(module), found.dtype, copy=True)
            module._parameters[name] = nn.Parameter(brought, requires_grad=parameter.requires_grad)
    for hook in changed:
        hook.offload = False

    def undo() -> None:
        module._parameters.update(before)
        for hook in changed:
            hook.offload = True

    return undo
