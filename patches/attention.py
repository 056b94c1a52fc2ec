"""Gives a model the ``"hfkv"`` attention, or finds the reason to leave it its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hfkv.attention.function import NAME
from hfkv.models.attention_keywords import learn, own_attention_reason
from hfkv.patches.configs import own_configs
from hfkv.patches.undo import Undo


def set_attention(model: PreTrainedModel, undo: Undo) -> str | None:
    """Makes the decoder of `model` use the ``"hfkv"`` attention.

    The model gets copies of its configs first: another model that shares them keeps its attention.

    Returns:
        None, or the reason for which the model keeps its own attention.
    """
    decoder = _decoder_config(model.config)
    reason = own_attention_reason(model.config) or own_attention_reason(decoder)
    if reason is not None:
        return reason
    decoders = [
        module for module in model.modules() if isinstance(module, PreTrainedModel) and module.config is decoder
    ]
    if not all(module._can_set_attn_implementation() for module in decoders):
        return "its code does not go through transformers' attention functions"
    own_configs(model, undo)
    decoder = _decoder_config(model.config)
    model.set_attn_implementation(_request(model.config, decoder))
    if decoder._attn_implementation != NAME:
        return f"it insists on its {decoder._attn_implementation!r} attention"
    learn(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            undo.override(_choose_attention, part, "set_attn_implementation", (model,), needs_patch=False)
    return None


def _choose_attention(part: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Sets an attention as the class does: it is the owner's choice."""
    result = type(part).set_attn_implementation(part, *args, **kwargs)
    if "hfkv" in vars(model):
        model.hfkv.attention = _decoder_config(model.config)._attn_implementation
    return result


def keep_attention(model: Any) -> None:
    """Puts back the attention of a patched model where a `generate` of its own has set another in the config.

    Whisper does so for good when it is asked for timestamps of tokens: ours gives the weights that these are made of.
    """
    if model.hfkv.own_attention is not None:
        return
    config, attention = _decoder_config(model.config), model.hfkv.attention
    if config._attn_implementation != attention:
        model.hfkv.log_once(
            f"{type(model).__name__}: its attention was set to {config._attn_implementation!r} in the config, and is "
            f"{attention!r} again, which gives attention weights too; model.set_attn_implementation() chooses another"
        )
        config._attn_implementation = attention


def _decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config object the decoder's modules hold: encoder-decoders answer with a copy of the one they share."""
    decoder = config.get_text_config(decoder=True)
    parts = [getattr(config, name, None) for name in config.sub_configs]
    nested = [getattr(part, name, None) for part in parts if part is not None for name in part.sub_configs]
    return decoder if any(decoder is part for part in (*parts, *nested)) else config


def _request(config: PreTrainedConfig, decoder: PreTrainedConfig) -> Any:
    """The request for the decoder alone where a larger model holds it: a vision tower keeps its attention."""
    parts = [name for name in config.sub_configs if getattr(config, name, None) is decoder]
    return {parts[0]: NAME} if decoder is not config and parts else NAME
