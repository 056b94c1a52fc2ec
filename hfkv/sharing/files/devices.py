"""The devices on which the layers of a model compute."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hfkv.models.probe import decoder_of


def devices_of(model: PreTrainedModel, num_layers: int) -> dict[int, torch.device]:
    """The device on which each layer of the decoder computes: its weights', or where accelerate brings them."""
    found: dict[int, torch.device] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index not in found:
            device = device_of(module)
            if device is not None:
                found[index] = device
    rest = device_of(model) or torch.device("cpu")
    return {index: found.get(index, rest) for index in range(num_layers)}


def device_of(module: torch.nn.Module) -> torch.device | None:
    """The device on which a module computes; None where it has no weights."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((weight.device for weight in module.parameters() if weight.device.type != "meta"), None)
