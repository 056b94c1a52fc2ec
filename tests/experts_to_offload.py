"""Experts of a layer, resident and offloaded, of the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hfkv.experts.config import MoEConfig
from hfkv.experts.families import weight_names
from hfkv.experts.offload.expert_source import ExpertSource, blank
from hfkv.experts.offload.offloaded import OffloadedWeights
from hfkv.experts.offload.place import offload_experts
from hfkv.experts.offload.slots import ExpertSlots
from hfkv.experts.projection import Projection
from hfkv.experts.stack import ExpertStack, as_parameter
from hfkv.experts.weights import ExpertWeights
from hfkv.stores.offload.bus import bus_to

CODECS = ("none", "int8", "int4")
CPU = torch.device("cpu")
E, K, H = 6, 2, 32


def module(dtype: torch.dtype = torch.bfloat16, kind: str = "mixtral") -> Any:
    """Experts of a layer, with random numbers."""
    sizes = {"hidden_size": H, "intermediate_size": 48, "num_local_experts": E, "num_experts_per_tok": K}
    config: Any = MixtralConfig(**sizes) if kind == "mixtral" else GptOssConfig(**sizes)
    config._experts_implementation = "hfkv"
    experts = (MixtralExperts if kind == "mixtral" else GptOssExperts)(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


def matrices_of(experts: Any) -> list[torch.Tensor]:
    stacks = [getattr(experts, name).detach() for name in weight_names(experts)]
    return [stack.transpose(1, 2) if experts.is_transposed else stack for stack in stacks]


def resident(experts: Any, codec: str, *, is_packed: bool = True) -> list[ExpertWeights]:
    found = []
    for matrices in matrices_of(experts):
        weights = blank(codec, tuple(matrices.shape), matrices.dtype, matrices.device, is_packed=is_packed)
        weights.write_all(matrices)
        found.append(weights)
    return found


def with_weights(experts: Any, pair: Any) -> Any:
    """A copy of a module whose stacks stand for `pair`."""
    copied = copy.deepcopy(experts)
    for name, weights in zip(weight_names(experts), pair, strict=True):
        copied.register_parameter(name, as_parameter(ExpertStack(weights, experts.is_transposed), False))
    return copied


def offloaded(experts: Any, codec: str, num_slots: int, path: Path, **given: Any) -> Any:
    config = MoEConfig(codec=codec, offload=True, path=str(path), **given)
    return offload_experts(experts, config, num_slots)


def behind_a_bus(
    experts: Any, codec: str, num_slots: int, eviction: str = "lru", is_pinned: bool = True
) -> ExpertSlots:
    """Slots apart from host memory, as on a device, whatever the codec."""
    sources = []
    for weights in resident(experts, codec, is_packed=False):
        planes = {name: plane.contiguous().clone() for name, plane in weights.planes().items()}
        sources.append(
            ExpertSource(
                codec, weights.shape, weights.dtype, planes, has_cpu_order=codec == "int4", is_pinned=is_pinned
            )
        )
    return ExpertSlots(sources[0], sources[1], num_slots, eviction, CPU, bus_to(CPU))


def projections(slots: ExpertSlots, bias: Any = (None, None), factors: Any = ((), ())) -> tuple[Projection, Projection]:
    up, down = (Projection(OffloadedWeights(slots, half), bias[half], factors[half], False) for half in (0, 1))
    return up, down


def tokens(count: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = (
        torch.stack([torch.randperm(E)[:K] for _ in range(count)]) if count else torch.zeros(0, K, dtype=torch.int64)
    )
    return torch.randn(count, H, dtype=dtype), index, torch.rand(count, K).to(dtype)
