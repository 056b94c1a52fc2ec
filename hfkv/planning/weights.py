"""`Weights`: the bytes of a model's weights in some precision, and how many a decode step reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hfkv.models.probe import decoder_of

QUANTISED = ("int8", "int4")
# bitsandbytes' NF4: numbers that share a scale in fp32, the scales themselves not quantised once more, and the fp32
# table of the sixteen values that every layer has one of.
INT4_BLOCK, INT4_TABLE_BYTES = 64, 64
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's weights in one precision.

    Attributes:
        name: ``"bf16"`` (or the dtype that was asked for), ``"int8"``, ``"int4"``, or ``"loaded"``.
        nbytes: bytes of parameters and buffers, tied ones once.
        dense_bytes: bytes of the weights that a decode step reads for any token.
        expert_bytes: bytes of all experts.
        num_experts: E; 0 without experts.
        top_k: experts that one token is sent to.
    """

    name: str
    nbytes: int
    dense_bytes: int
    expert_bytes: int
    num_experts: int
    top_k: int

    def read(self, batch: int) -> int:
        """The bytes that a decode step of `batch` rows reads: at most the experts its tokens are sent to."""
        if not self.num_experts:
            return self.dense_bytes
        return self.dense_bytes + self.expert_bytes * min(self.num_experts, batch * self.top_k) // self.num_experts


def planned_weights(skeleton: PreTrainedModel, full: str) -> dict[str, Weights]:
    """The weights of a model in its full precision, and as bitsandbytes would load them in 8 and in 4 bits.

    bitsandbytes quantises linear layers. Embeddings, norms, the output layer and stacks of experts that are one
    parameter stay as they are.

    Args:
        skeleton: the model; its weights may be on the meta device.
        full: the name of its dtype.
    """
    quantised = _quantised_weights(skeleton)
    sizes = {
        full: lambda weight: weight.nbytes,
        "int8": lambda weight: _int8_bytes(weight) if id(weight) in quantised else weight.nbytes,
        "int4": lambda weight: _int4_bytes(weight) if id(weight) in quantised else weight.nbytes,
    }
    return {name: _weights(name, skeleton, size) for name, size in sizes.items()}


def loaded_weights(model: Any) -> Weights:
    """The weights of a model as they are, in whatever precision it was loaded, adapters included."""
    return _weights("loaded", model, _present_bytes)


def stacked_experts(skeleton: PreTrainedModel) -> int:
    """The bytes of the experts that are one parameter a layer, which bitsandbytes leaves alone."""
    return sum(weight.nbytes for name, weight in skeleton.named_parameters() if _is_expert(name) and weight.ndim == 3)


def _weights(name: str, model: Any, size: Any) -> Weights:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    num_experts, top_k = _experts(base.config.get_text_config(decoder=True))
    read = _read_each_step(base)
    dense = experts = total = 0
    for path, weight in model.named_parameters():
        num_bytes = size(weight)
        total += num_bytes
        if id(weight) not in read:
            continue
        if num_experts and _is_expert(path):
            experts += num_bytes
        else:
            dense += num_bytes
    total += sum(buffer.nbytes for buffer in model.buffers())
    return Weights(name, total, dense, experts, num_experts if experts else 0, top_k)


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _experts(config: Any) -> tuple[int, int]:
    """E and K; where the config does not say how many a token is sent to, all."""
    num_experts = next((n for n in _fields(config, _NUM_EXPERTS)), 0)
    return num_experts, next((k for k in _fields(config, _TOP_K)), num_experts)


def _fields(config: Any, names: Iterable[str]) -> Iterator[int]:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            yield value


def _read_each_step(model: PreTrainedModel) -> set[int]:
    """The parameters, by identity, of which a decode step reads every number: no encoder, no table of embeddings."""
    decoder, output = decoder_of(model), model.get_output_embeddings()
    read = {id(weight) for weight in decoder.parameters()}
    read -= {
        id(weight)
        for module in decoder.modules()
        if isinstance(module, torch.nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    return read | ({id(weight) for weight in output.parameters()} if output is not None else set())


def _quantised_weights(model: PreTrainedModel) -> set[int]:
    """The weights, by identity, that bitsandbytes would replace, by transformers' own rules."""
    left_alone = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, left_alone)
    }


def _int8_bytes(weight: torch.Tensor) -> int:
    """Int8 bytes: one a number and an fp32 scale a row (the rows of gpt2's transposed layers are its columns)."""
    return weight.numel() + 4 * weight.shape[0]


def _int4_bytes(weight: torch.Tensor) -> int:
    return -(-weight.numel() // 2) + 4 * -(-weight.numel() // INT4_BLOCK) + INT4_TABLE_BYTES


def _present_bytes(weight: torch.Tensor) -> int:
    """The bytes of a parameter, and of the scales that bitsandbytes keeps beside it."""
    scales = getattr(weight, "SCB", None)
    state = getattr(weight, "quant_state", None)
    beside = [scales] if isinstance(scales, torch.Tensor) else []
    while state is not None:
        found = (state.absmax, state.code, state.offset)
        beside += [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
        state = state.state2
    return weight.nbytes + sum(tensor.nbytes for tensor in beside)
