"""Takes the experts of a module from where they are, and makes offloaded ones of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hfkv.experts.config import MoEConfig
from hfkv.experts.families import weight_names
from hfkv.experts.offload.expert_file import file_of
from hfkv.experts.offload.expert_source import expert_bytes
from hfkv.experts.offload.offloaded import OffloadedWeights
from hfkv.experts.offload.present import PresentWeights, bus_for, codec_of
from hfkv.experts.offload.slots import ExpertSlots
from hfkv.experts.offload.trace import ExpertTrace

_TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "top_k")


def offload_experts(
    module: Any, config: MoEConfig, num_slots: int, trace: ExpertTrace | None = None, *, name: str = "experts"
) -> tuple[OffloadedWeights, OffloadedWeights]:
    """Offloads the experts of one module: weights into an expert, and out of it. The module is left as it is.

    They are read from plain parameters, from `ExpertStack`s, or from where accelerate has put them. With a ``path``
    they come from a file of ours there, written first where it is missing, one expert at a time. Without one, weights
    of codec none that accelerate keeps on disk are read from its own file.

    Args:
        module: an experts module that transformers' interface runs.
        config: a config with ``offload``.
        num_slots: S; see `slots_for_budget`.
        trace: a trace that counts and records the layer too; None for the layer's own counts alone.
        name: the module's name in its model, after which its file is called.

    Raises:
        ValueError: a CPU has no path, the weights are not to be had, or a file holds other weights.
        MemoryError: there is no memory for slots or host memory, or it cannot be pinned.
        OSError: the file cannot be written.
    """
    given = [PresentWeights.of(module, parameter) for parameter in weight_names(module)]
    device = given[0].device
    bus = bus_for(device)
    codec = codec_of(config, given, name)
    are_on_disk = all(each.at_rest is not None and each.at_rest.path is not None for each in given)
    if config.path is None and codec == "none" and are_on_disk:
        sources = [each.own_source() for each in given]
    elif config.path is not None:
        file = file_of(config.path, name, given, codec, has_cpu_order=codec == "int4" and device.type == "cpu")
        sources = [file.source("up"), file.source("down")]
    elif bus is None:
        raise ValueError(
            f"offload=True on {device}: host memory is the device's own memory here; give a folder for the experts, "
            'MoEConfig(offload=True, path="..."), or leave offload out'
        )
    else:
        sources = [each.host_source(codec, bus) for each in given]
    slots = ExpertSlots(sources[0], sources[1], num_slots, config.eviction, device, bus)
    if trace is not None:
        trace.add(name, slots.layer)
    return OffloadedWeights(slots, 0), OffloadedWeights(slots, 1)


def slots_for_budget(modules: Iterable[Any], budget: int | None, codec: str, top_k: int | None = None) -> int:
    """The number of slots of every layer that together take `budget` bytes at most.

    Args:
        modules: the experts modules of a model.
        budget: bytes for all layers; None for as many slots as one token chooses experts.
        codec: the experts' codec.
        top_k: experts of a token; None for what the modules' config says.

    Raises:
        ValueError: the budget holds fewer than `top_k` experts a layer, naming the smallest that does.
    """
    every = list(modules)
    least = max((top_k_of(module) for module in every), default=1) if top_k is None else top_k
    if budget is None:
        return least
    slot_bytes = sum(_slot_bytes(module, codec) for module in every)
    slots = budget // max(slot_bytes, 1)
    if slots < least:
        raise ValueError(
            f"device_budget is {budget:,} bytes for {len(every)} layers, each of which needs slots for the {least} "
            f"experts of a token; give at least {least * slot_bytes:,} bytes, or a smaller codec, or "
            "leave device_budget out"
        )
    return min(slots, max(module._parameters["down_proj"].shape[0] for module in every))


def top_k_of(module: Any) -> int:
    """The number of experts that one token chooses.

    Raises:
        ValueError: the module's config does not say.
    """
    for name in _TOP_K:
        value = getattr(module.config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"the config of {type(module).__name__} says none of {', '.join(_TOP_K)}; give top_k")


def _slot_bytes(module: Any, codec: str) -> int:
    total = 0
    for parameter in weight_names(module):
        tensor = module._parameters[parameter]
        experts, outputs, inputs = tensor.shape
        shape = (experts, inputs, outputs) if module.is_transposed else (experts, outputs, inputs)
        total += expert_bytes(codec, shape, tensor.dtype)
    return total
