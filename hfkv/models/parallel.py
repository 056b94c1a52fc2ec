"""`ParallelPlan`: over how many processes one model is spread, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParallelPlan:
    """How transformers has spread a model over processes, each of which runs the same program.

    Attributes:
        heads: processes that share the kv heads of each layer (tensor parallel).
        experts: processes that share the experts of each layer (expert parallel).
        stages: processes that share the layers (pipeline parallel).
        replicas: groups that have a batch each and exchange weights in every forward (FSDP).
    """

    heads: int = 1
    experts: int = 1
    stages: int = 1
    replicas: int = 1

    @property
    def is_one(self) -> bool:
        """Whether one process holds all of the model."""
        return self.heads == self.experts == self.stages == self.replicas == 1


def parallel_plan_of(config_or_model: Any) -> ParallelPlan:
    """The `ParallelPlan` that a model's config tells; a single process where it says nothing."""
    config = getattr(config_or_model, "config", config_or_model)
    asked = getattr(config, "distributed_config", None)
    if asked is None:
        return ParallelPlan()
    heads, experts = asked.tp_size or 1, getattr(asked, "ep_size", None) or 1
    if asked.enable_expert_parallel and not hasattr(asked, "ep_size"):
        heads, experts = 1, heads  # transformers 5.17 shares the experts or everything else
    if asked.tp_plan == {}:
        heads = 1  # experts alone
    replicas = (getattr(asked, "dp_replicate_size", None) or 1) * (asked.fsdp_size or 1)
    return ParallelPlan(heads, experts, asked.pp_size or 1, replicas)


def own_layers(model: Any, num_layers: int) -> range:
    """The layers that this process computes: all of them, except in a stage of a pipeline."""
    stage = getattr(model, "_pp_stage", None)
    return range(num_layers) if stage is None else range(*stage.layer_range_for_rank(stage.pp_rank, num_layers))


def agreed(model: Any, values: Sequence[int]) -> list[int]:
    """The least of each value over the processes that compute one batch together; `values` in a single process.

    What a forward is given must be the same in all of them, and what each has found by itself may not be: one may have
    had to forget a page of which another has a smaller part.

    Args:
        model: a transformers model.
        values: whole numbers, as many in each process.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or not values:
        return list(values)
    device = torch.device("cpu") if mesh.device_type == "cpu" else model.device
    least = torch.tensor(list(values), dtype=torch.int64, device=device)
    for name in mesh.mesh_dim_names or (None,):
        # Replicas have batches of their own.
        if name in ("tp", "pp", None):
            group = mesh.get_group(name)
            if dist.get_world_size(group) > 1:
                dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return least.tolist()
