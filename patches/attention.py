"""Gives a model the ``"hfkv"`` attention, or finds the reason to leave it its own."""

from __future__ import annotations

import copy
from typing import Any

from hfkv.patches.undo import Undo
from transformers import PreTrainedConfig, PreTrainedModel

from hfkv.attention import NAME

# Models whose attention function does more than attend, and does it only under transformers' own names.
_SPARSE = "it applies its sparse index only under transformers' own attentions"
OWN_ATTENTION = {
    "axk2": _SPARSE,
    "deepseek_v32": _SPARSE,
    "deepseek_v4": _SPARSE,
    "dots3_note": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "hy_v4": _SPARSE,
    "minimax_m3": _SPARSE,
    "mistral_large4": _SPARSE,
    "git": "it changes its keys and values between the cache and the attention",
    "inkling2": "it passes a keyword to its attention that only its own functions know",
}


def set_attention(model: PreTrainedModel, undo: Undo) -> str | None:
    """Makes the decoder of `model` use the ``"hfkv"`` attention.

    The model gets copies of its configs first: another model that shares them keeps its attention.

    Returns:
        None, or the reason for which the model keeps its own attention.
    """
    decoder = model.config.get_text_config(decoder=True)
    for config in (model.config, decoder):
        reason = next((why for kind, why in OWN_ATTENTION.items() if _is_kind(config, kind)), None)
        if reason is not None:
            return reason
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    own_code = [module for module in submodels if not module._can_set_attn_implementation()]
    if any(module.config.get_text_config(decoder=True) is decoder for module in own_code):
        return "its code does not go through transformers' attention functions"
    _copy_configs(model, undo)
    decoder = model.config.get_text_config(decoder=True)
    model.set_attn_implementation(_request(model.config, decoder))
    if decoder._attn_implementation != NAME:
        return f"it insists on its {decoder._attn_implementation!r} attention"
    return None


def _is_kind(config: PreTrainedConfig, kind: str) -> bool:
    return config.model_type == kind or config.model_type.startswith(f"{kind}_")


def _request(config: PreTrainedConfig, decoder: PreTrainedConfig) -> Any:
    """The decoder alone where it is a part of a larger model: a vision tower keeps its attention."""
    parts = [name for name in config.sub_configs if getattr(config, name, None) is decoder]
    return {parts[0]: NAME} if decoder is not config and parts else NAME


def _copy_configs(model: PreTrainedModel, undo: Undo) -> None:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                undo.set(module, name, copy.deepcopy(value, memo))
