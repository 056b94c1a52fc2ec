"""`Geometry`: what a model keeps of every token in every layer, learnt from its config alone."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, EncoderDecoderCache

from hfkv.cache.factory import decoder_config, is_replaced
from hfkv.models.latents import widths_of
from hfkv.models.probe import base_model, cross_attention_layers, decoder_of
from hfkv.models.shapes import Heads
from hfkv.policy.errors import RequestError

_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)
# Two lengths tell what a layer keeps of each token from what it keeps of a row; some linear attentions want a few.
_LENGTHS = (4, 8)


class States(NamedTuple):
    """The shapes and dtypes of one layer's keys and values.

    Attributes:
        key_heads, key_dim: H and Dk.
        value_heads, value_dim: H and Dv.
        dtype: the dtype of both.
        index_dim: the width of the keys by which an indexer picks tokens, one a token; 0 without one.
        index_dtype: the dtype of these keys.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype
    index_dim: int = 0
    index_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, layer: Any) -> States:
        """The states of a layer of transformers' cache that holds some tokens."""
        keys, values, index = layer.keys, layer.values, getattr(layer, "indexer_keys", None)
        states = cls(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype)
        return states if index is None else states._replace(index_dim=index.shape[-1], index_dtype=index.dtype)


@dataclass(frozen=True)
class Geometry:
    """A model without its weights, and what a cache of it holds.

    Attributes:
        skeleton: the model, its weights on the meta device.
        config: the config of its text decoder.
        states: the states of the layers that hfkv's replace, by index.
        own_row_bytes: bytes a row of the layers that stay transformers' own (the states of linear attention).
        own_token_bytes: bytes of the same layers for each token of a row.
        notes: what could not be learnt.
    """

    skeleton: PreTrainedModel
    config: PreTrainedConfig
    states: dict[int, States]
    own_row_bytes: int
    own_token_bytes: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config_or_model: Any, dtype: torch.dtype) -> Geometry:
        """Builds the model on the meta device and runs a few tokens through it: nothing is computed or loaded.

        Args:
            config_or_model: a config, or a model, of which only config and class are looked at.
            dtype: the dtype of the weights, and so of the keys and values.

        Raises:
            TypeError: it is neither.
            ValueError: transformers has no generating model for the config, or what a layer keeps cannot be known.
        """
        skeleton = _skeleton(config_or_model, dtype)
        config = decoder_config(skeleton)
        notes = []
        if skeleton.config.is_encoder_decoder:
            notes.append("the keys and values of the cross-attention, which are the source's, are not counted")
        try:
            caches = [_fill(skeleton, config, length) for length in _LENGTHS]
        except Exception as error:  # of a model's own code, which may ask the meta device for numbers
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            states = _states_of_fields(config, dtype, reason)
            notes.append(f"heads are those its config names, for its code does not run without weights ({reason})")
            return cls(skeleton, config, states, 0, 0, tuple(notes))
        states, others = {}, []
        cross = cross_attention_layers(config)
        for index, layer in enumerate(caches[0].layers):
            if is_replaced(layer, config) and index not in cross:
                if layer.keys is not None:
                    states[index] = States.of(layer)
                elif _layer_bytes(layer):  # it attends to what another layer holds, and picks among it by itself
                    others.append(index)
            else:
                others.append(index)
        if not states:
            raise ValueError(f"{config.model_type!r} keeps no plain keys and values: there is nothing to plan for hfkv")
        short, long = (sum(_layer_bytes(cache.layers[index]) for index in others) for cache in caches)
        per_token = (long - short) // (_LENGTHS[1] - _LENGTHS[0])
        unseen = [str(index) for index in others if not _layer_bytes(caches[0].layers[index])]
        if unseen:
            notes.append(f"layers that stay transformers' own and hold no text are not counted: {', '.join(unseen)}")
        return cls(skeleton, config, states, short - _LENGTHS[0] * per_token, per_token, tuple(notes))


def _skeleton(config_or_model: Any, dtype: torch.dtype) -> PreTrainedModel:
    model = base_model(config_or_model)
    config = copy.deepcopy(getattr(model, "config", model))
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"a plan is made for a model or its config, got {type(config_or_model).__name__}")
    # What loads weights in fewer bits is looked at apart; and a stock attention runs on the meta device.
    vars(config).pop("quantization_config", None)
    reasons = []
    builders = [type(model)._from_config] if isinstance(model, PreTrainedModel) else [c.from_config for c in _CLASSES]
    for build in builders:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _runnable(build(config, dtype=dtype, attn_implementation="eager").eval())
        except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
            reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise ValueError(f"{config.model_type!r} cannot be built as a model that generates text: {reasons[0]}")


def _runnable(model: PreTrainedModel) -> PreTrainedModel:
    """The model without anything that asks the meta device for numbers, where transformers lets one choose."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        # Some look for padding among the tokens, to warn. A strict config would refuse None.
        vars(config)["pad_token_id"] = None
    with contextlib.suppress(ValueError):  # it has no experts that can be chosen
        model.set_experts_implementation("batched_mm")
    return model


def _fill(model: PreTrainedModel, config: PreTrainedConfig, length: int) -> DynamicCache:
    """Fills transformers' cache with a few tokens of one row."""
    decoder = decoder_of(model)
    cache = DynamicCache(config=config)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(1, length, dtype=torch.long, device="meta"),
        "past_key_values": cache,
        "use_cache": True,
    }
    if model.config.is_encoder_decoder:
        inputs["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
        width = getattr(decoder.config, "hidden_size", None) or config.d_model
        inputs["encoder_hidden_states"] = torch.zeros(1, length, width, dtype=model.dtype, device="meta")
    elif "position_ids" in inspect.signature(type(decoder).forward).parameters:
        inputs["position_ids"] = torch.arange(length, device="meta")[None]
    with torch.no_grad(), torch.device("meta"):
        decoder(**inputs)
    return cache


def _layer_bytes(layer: Any) -> int:
    """The bytes of a layer of transformers' own. Storages on the meta device have no addresses to tell them apart."""
    found: dict[int, torch.Tensor] = {}
    for value in vars(layer).values():
        values = value.values() if isinstance(value, dict) else (value,)
        found.update((id(tensor), tensor) for tensor in values if isinstance(tensor, torch.Tensor))
    return sum(tensor.nbytes for tensor in found.values())


def _states_of_fields(config: PreTrainedConfig, dtype: torch.dtype, reason: str) -> dict[int, States]:
    """The states of all plain layers, by the fields that most configs have."""
    unknown = (
        f"what the layers of {config.model_type!r} cache cannot be known: the model does not run without weights "
        f"({reason}), and its config does not say it for all layers alike"
    )
    states = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicIndexedLayer:
            raise ValueError(unknown)  # several may share an indexer
        if not is_replaced(layer, config):
            continue
        widths = widths_of(config, index)
        if widths is not None:
            states[index] = States(1, widths.latent, 1, widths.rotary, dtype)
            continue
        try:
            heads = Heads.of(config)
        except (RequestError, AttributeError, RuntimeError) as error:
            raise ValueError(unknown) from error
        states[index] = States(heads.kv_heads, heads.head_dim, heads.kv_heads, heads.head_dim, dtype)
    return states
