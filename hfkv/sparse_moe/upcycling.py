"""Makes a dense model a stock mixture-of-experts architecture of transformers, every expert a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from hfkv.sparse_moe.ffn import DenseFFN, add_noise, decoder_layers


@dataclass(frozen=True)
class UpcyclingTarget:
    """A stock architecture, and the dense models that can become one.

    Attributes:
        config_class: the architecture's config class.
        sources: class names of the dense models that have the same attention, norms and embeddings.
        fields: the fields of its config for a dense config, a number of experts and the layers to upcycle.
        refusal: why a dense model of a source class cannot become one all the same; None where it can.
    """

    config_class: type[PreTrainedConfig]
    sources: tuple[str, ...]
    fields: Callable[[Any, int, list[int]], dict[str, Any]]
    refusal: Callable[[Any, list[int]], str | None]


def _mixtral_fields(config: Any, num_experts: int, layers: list[int]) -> dict[str, Any]:
    return {"num_local_experts": num_experts}


def _mixtral_refusal(config: Any, layers: list[int]) -> str | None:
    if len(layers) < config.num_hidden_layers:
        return "in a Mixtral every layer is a mixture; leave layers out"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "a Mixtral has no biases, and this model does (attention_bias or mlp_bias)"
    return None


def _qwen3_fields(config: Any, num_experts: int, layers: list[int]) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "moe_intermediate_size": config.intermediate_size,
        # Qwen3-MoE has this as a switch. Without it the weights sum to less than 1.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(config.num_hidden_layers)) - set(layers)),
    }


def _qwen3_refusal(config: Any, layers: list[int]) -> str | None:
    if config.use_sliding_window:
        return "a Qwen3-MoE slides in all layers or none, and this model in some (use_sliding_window)"
    return None


TARGETS = {
    "mixtral": UpcyclingTarget(
        MixtralConfig, ("LlamaForCausalLM", "MistralForCausalLM"), _mixtral_fields, _mixtral_refusal
    ),
    "qwen3_moe": UpcyclingTarget(Qwen3MoeConfig, ("Qwen3ForCausalLM",), _qwen3_fields, _qwen3_refusal),
}
# Fields of a dense config that say which architecture it is, or what a mixture has of its own.
OWN_FIELDS = {"model_type", "architectures", "transformers_version", "num_experts_per_tok", "layer_types"}


def convert(
    model: PreTrainedModel,
    to: str,
    ffns: Mapping[int, DenseFFN],
    num_experts: int,
    top_k: int,
    noise: float,
    router_std: float,
    aux_loss_coef: float | None,
) -> PreTrainedModel:
    """Builds the stock model; the dense one is left alone.

    Args:
        model: a causal language model.
        to: a key of `TARGETS`.
        ffns: the dense modules to upcycle by layer index.
        num_experts, top_k, noise, router_std: see `hfkv.upcycle`.
        aux_loss_coef: ``router_aux_loss_coef`` of the new config; None for that architecture's default.

    Raises:
        ValueError: there is no such architecture, or this model cannot become one.
    """
    if to not in TARGETS:
        raise ValueError(f"to takes None, {', '.join(map(repr, TARGETS))}; got {to!r}")
    target = TARGETS[to]
    if type(model).__name__ not in target.sources:
        raise ValueError(
            f"to={to!r} takes {' or '.join(target.sources)}, got {type(model).__name__}; without `to` the model is "
            "upcycled in place"
        )
    reason = target.refusal(model.config, list(ffns))
    if reason is not None:
        raise ValueError(f"to={to!r}: {reason}; without `to` the model is upcycled in place")
    config = _config(model.config, target, num_experts, top_k, list(ffns), aux_loss_coef)
    stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=_attention(model))
    stock.to(model.device).train(model.training)
    stock.load_state_dict(_state(model, stock, ffns, num_experts, router_std))
    for index in ffns:
        add_noise(decoder_layers(stock)[index].get_submodule("mlp.experts"), noise)
    if model.generation_config is not None:
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


def _attention(model: PreTrainedModel) -> str | None:
    return getattr(model.config, "_attn_implementation", None)


def _config(
    dense: PreTrainedConfig,
    target: UpcyclingTarget,
    num_experts: int,
    top_k: int,
    layers: list[int],
    aux_loss_coef: float | None,
) -> PreTrainedConfig:
    kept = {name: value for name, value in dense.to_dict().items() if name not in OWN_FIELDS}
    # What the architecture has no field for would become an attribute without a meaning.
    known = set(target.config_class().to_dict())
    fields = {name: value for name, value in kept.items() if name in known}
    fields |= {"num_experts_per_tok": top_k, **target.fields(dense, num_experts, layers)}
    if aux_loss_coef is not None:
        fields["router_aux_loss_coef"] = aux_loss_coef
    return target.config_class(**fields)


def _state(
    model: PreTrainedModel, stock: PreTrainedModel, ffns: Mapping[int, DenseFFN], num_experts: int, router_std: float
) -> dict[str, torch.Tensor]:
    """The state dict of the stock model."""
    names = {id(module): name for name, module in model.named_modules()}
    state = dict(model.state_dict())
    for ffn in ffns.values():
        prefix = names[id(ffn.module)]
        for name in [name for name in state if name.startswith(f"{prefix}.")]:
            del state[name]
        state |= {f"{prefix}.experts.{name}": stack for name, stack in ffn.stacks(num_experts).items()}
        router = torch.empty(num_experts, ffn.up[0].in_features, device=ffn.down.weight.device, dtype=model.dtype)
        state[f"{prefix}.gate.weight"] = nn.init.normal_(router, std=router_std)
    return state
