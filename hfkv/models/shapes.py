"""Shapes of models by name, and what a config says of heads."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from hfkv.policy.errors import RequestError


def _shape(
    model_type: str, sizes: tuple[int, int, int, int], heads: tuple[int, int, int], theta: float, **more: Any
) -> dict[str, Any]:
    """Fields of a config: vocabulary, hidden, intermediate and layers; query heads, kv heads and their size."""
    names: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    rope = {"rope_type": "default", "rope_theta": theta}
    fields = dict(zip(names, (*sizes, *heads), strict=True))
    return {"model_type": model_type, **fields, "max_position_embeddings": 131_072, "rope_parameters": rope, **more}


_EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": _shape("llama", (128_256, 4096, 14_336, 32), (32, 8, 128), 500_000.0),
    "qwen3-30b-a3b": _shape("qwen3_moe", (151_936, 2048, 6144, 48), (32, 4, 128), 1_000_000.0, **_EXPERTS),
    "small": _shape("llama", (131, 512, 256, 4), (32, 8, 128), 500_000.0),
    "host": _shape("llama", (64, 64, 64, 32), (4, 2, 16), 10_000.0),
    "tiny": _shape("llama", (131, 128, 128, 2), (4, 2, 64), 10_000.0),
}
_CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen3_moe": Qwen3MoeConfig}


def shape_config(shape: str | None, model: str | None) -> PreTrainedConfig:
    """The config of a shape by name, or of a model; nothing else of the model is read.

    Raises:
        RequestError: there is no such shape or model, or its attention is not of keys and values a head.
    """
    if model is None:
        if shape not in SHAPES:
            raise RequestError(f"the shape {shape!r} is unknown; allowed: {', '.join(SHAPES)}, or a model of your own")
        fields = dict(SHAPES[shape])
        return _CONFIGS[fields.pop("model_type")](**fields)
    try:
        return AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the model {model!r} has no config that could be read: {str(error).splitlines()[0]} Give a folder that "
            "save_pretrained wrote, or a name on the Hub"
        ) from error


def with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """A copy of `config` with another number of layers: the first ones, or all of them repeated."""
    config = copy.deepcopy(config)
    before = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = num_layers
    if kinds is not None:
        config.layer_types = [kinds[index % before] for index in range(num_layers)]
    return config


@dataclass(frozen=True)
class Heads:
    """The heads of one attention layer, and their width.

    Attributes:
        query_heads: Hq.
        kv_heads: H.
        head_dim: D.
    """

    query_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Heads:
        """The heads of a config.

        Raises:
            RequestError: its layers hold no keys and values a head (a latent, or no attention at all).
        """
        query_heads = getattr(config, "num_attention_heads", None)
        if not query_heads:
            raise RequestError(
                f"{config.model_type!r} holds no plain keys and values in its layers, which the random contents of "
                "hfkv bench are made for; take another model"
            )
        if getattr(config, "kv_lora_rank", None):
            raise RequestError(
                f"{config.model_type!r} has latent attention, and the random contents of this suite are keys and "
                "values a head; hfkv bench mla measures it"
            )
        try:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
            kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
        except RuntimeError as error:  # a config that says a number for each layer only (gemma4)
            raise RequestError(
                f"the layers of {config.model_type!r} have different heads, and hfkv bench fills all alike; take "
                "another model"
            ) from error
        return cls(query_heads, kv_heads, head_dim)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in one layer, as the model computes them."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the shape without any weights, to look at.

    Raises:
        RequestError: transformers has no causal language model for this config.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{config.model_type!r} cannot be built: {str(error).splitlines()[0]}") from error
