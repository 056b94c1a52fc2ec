"""Small models whose experts are saved, loaded and offloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from hfkv.experts.families import experts_of, weight_names
from hfkv.experts.stack import ExpertStack, as_parameter
from hfkv.models.weights_at_rest import bring_no_more
from tests.experts_to_offload import resident

NAME = "model.layers.{}.mlp.experts"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}


def model(kind: str = "mixtral") -> Any:
    built: Any = (
        MixtralForCausalLM(MixtralConfig(**SIZES))
        if kind == "mixtral"
        else GptOssForCausalLM(GptOssConfig(**SIZES, layer_types=["full_attention"] * 2))
    )
    built.set_experts_implementation("hfkv")
    return built.bfloat16().eval().requires_grad_(False)


def put(model: Any, pairs: Any) -> None:
    """What a patch does: weights in the place of a model's own."""
    for name, pair in pairs.items():
        module = experts_of(model)[name]
        bring_no_more(module, *weight_names(module))
        for parameter, weights in zip(weight_names(module), pair, strict=True):
            module._parameters[parameter] = as_parameter(ExpertStack(weights, module.is_transposed), False)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model(torch.randint(0, 64, (2, 9))).logits


def compressed(given: Any, codec: str) -> Any:
    """A model whose experts are all there, in a codec."""
    pairs = {name: resident(module, codec) for name, module in experts_of(given).items()}
    put(given, pairs)
    return given
