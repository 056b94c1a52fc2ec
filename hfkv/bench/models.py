"""Models of random weights, built from the shapes of real ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hfkv.bench.contenders import Contender
from hfkv.bench.setting import BenchError
from hfkv.measure.machine import free_bytes
from hfkv.models.shapes import skeleton
from hfkv.patches.patch import patch

# A shape with more bytes of weights takes minutes to build on a CPU and a second or more for every step.
MOST_CPU_WEIGHTS = 4 * 10**9
# What is left of the free memory for everything that is not weights, keys or values.
MOST_SHARE = 0.9


def check_room(what: str, num_bytes: int, device: torch.device, remedy: str) -> None:
    """Refuses what does not fit in the free memory of a device, with how much there is and the remedy."""
    free = free_bytes(device)
    if num_bytes > MOST_SHARE * free:
        raise BenchError(
            f"{what} need about {num_bytes / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free; {remedy}"
        )


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int, num_layers: int | None
) -> PreTrainedModel:
    """A causal language model with random weights of real shapes, for greedy generation without an end.

    It is refused where it does not fit in memory or, unless a number of layers was asked for, is too big for a CPU.
    """
    num_bytes = sum(weight.numel() for weight in skeleton(config).parameters()) * dtype.itemsize
    check_room(f"the weights of {config.num_hidden_layers} layers", num_bytes, device, "build fewer with --layers")
    if device.type == "cpu" and num_layers is None and num_bytes > MOST_CPU_WEIGHTS:
        raise BenchError(
            f"{config.num_hidden_layers} layers have {num_bytes / 1e9:.1f} GB of weights, too many for a CPU; build "
            "fewer with --layers 4, say, or take --shape small"
        )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights, to be patched or compiled on its own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def model_of(contender: Contender, model: PreTrainedModel) -> PreTrainedModel:
    """A contender's own model, patched where it is hfkv's, over the same weights as everyone's."""
    own = share_weights(model)
    if contender.kv is not None:
        patch(own, contender.kv, graphs=contender.graphs)
    return own


def weights_read(model: PreTrainedModel, batch: int) -> int:
    """Bytes of weights one decode step must read: no rows of an embedding table, and of experts those chosen only.

    Each of its rows may choose other experts.
    """
    config = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    chosen = min(experts, batch * (getattr(config, "num_experts_per_tok", None) or 0))
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is table
    total = 0
    for name, weight in model.named_parameters():
        if weight is not table or tied:
            total += int(weight.nbytes * (chosen / experts if experts and ".experts." in name else 1.0))
    return total
