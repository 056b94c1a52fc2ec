"""Why a model's attention is not that of hfkv's kernels, as its config and its code say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def own_attention_of(config: PreTrainedConfig, decoder: PreTrainedConfig) -> str | None:
    """Why a model keeps its own attention, or None where it takes hfkv's."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_MAPPING,
    )

    from hfkv.models.attention_keywords import own_attention_reason

    # The reason is read from the modelling code, which the mappings import.
    for part in (config, decoder):
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING):
            mapping.get(type(part), None)
    return own_attention_reason(config) or own_attention_reason(decoder)


def no_kernel_reason(config: PreTrainedConfig) -> str | None:
    """Why no kernel does this attention, or None where one does."""
    if hasattr(config, "relative_attention_num_buckets"):
        return "its attention adds a bias for positions to the scores, which kernels do not"
    if getattr(config, "alibi", False):
        return "its attention adds a bias for positions (alibi) to the scores, which kernels do not"
    return None
