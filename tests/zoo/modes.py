"""What a tiny model is asked to do, stock and patched, and what came of it as a tree of tensors or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from . import tokens
from .models import generate
from .outcomes import ERRORS, without_padding

NUM_DECODER_TOKENS = 5
NUM_CONTINUED = 3


def _several_ids(model: Any, inputs: dict[str, Any], count: int) -> torch.Tensor:
    """Random decoder ids `[B, count]`."""
    rows = len(next(iter(inputs.values())))
    generator = torch.Generator().manual_seed(count)
    return torch.randint(tokens.FIRST_TOKEN, tokens.LAST_TOKEN + 1, (rows, count), generator=generator)


def _first_row(inputs: dict[str, Any]) -> dict[str, Any]:
    """The row without padding."""
    rows = len(inputs["input_ids"]) if "input_ids" in inputs else len(next(iter(inputs.values())))
    return {name: value[rows - 1 :] if len(value) == rows else value for name, value in inputs.items()}


def _given(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of one forward over several tokens."""
    if model.config.is_encoder_decoder:
        return inputs | {"decoder_input_ids": _several_ids(model, inputs, NUM_DECODER_TOKENS)}
    return inputs


def _real(logits: torch.Tensor, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The logits of text, not of padding."""
    if model.config.is_encoder_decoder or "attention_mask" not in inputs:
        return logits
    mask = inputs["attention_mask"][:, -logits.shape[1] :]
    return torch.where(mask[..., None].bool(), logits, 0.0)


def greedy(model: Any, inputs: dict[str, Any]) -> Any:
    return generate(model, inputs)


def uncached(model: Any, inputs: dict[str, Any]) -> Any:
    return generate(model, inputs, use_cache=False, max_new_tokens=3)


def sampled_beams(model: Any, inputs: dict[str, Any]) -> Any:
    return generate(model, inputs, num_beams=3, num_return_sequences=2, do_sample=True, top_k=20)


def samples(model: Any, inputs: dict[str, Any]) -> Any:
    return generate(model, inputs, num_return_sequences=2, do_sample=True, top_k=20)


def lookup(model: Any, inputs: dict[str, Any]) -> Any:
    """The prompt repeats itself, so that there is something to look up."""
    inputs = _first_row(inputs)
    ids = inputs.get("input_ids")
    if ids is not None and ids.dtype == torch.long:
        half = ids[:, -(ids.shape[1] // 2) :]
        inputs = inputs | {"input_ids": torch.cat((ids[:, : ids.shape[1] - half.shape[1]], half), dim=1)}
    return generate(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=8)


def assisted(model: Any, inputs: dict[str, Any]) -> Any:
    """By a copy of its own weights' kind, that is right about as often as not."""
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return generate(model, _first_row(inputs), assistant_model=assistant, max_new_tokens=8)


def _states(model: Any, inputs: dict[str, Any], num_beams: int, names: tuple[str, ...]) -> Any:
    """What a call hands out besides tokens."""
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=3,
        min_new_tokens=3,
        return_dict_in_generate=True,
        **dict.fromkeys(names, True),
    )
    found = {name: value for name, value in output.items() if name != "past_key_values"}
    return found if model.config.is_encoder_decoder else without_padding(found, inputs.get("attention_mask"))


def hidden_states(model: Any, inputs: dict[str, Any]) -> Any:
    return _states(model, inputs, 2, ("output_hidden_states", "output_scores"))


def attentions(model: Any, inputs: dict[str, Any]) -> Any:
    return _states(model, inputs, 1, ("output_attentions", "output_hidden_states"))


@torch.no_grad()
def whole(model: Any, inputs: dict[str, Any]) -> Any:
    """Teacher forcing: logits of all tokens at once, without a cache and with one of the model's own."""
    given = _given(model, inputs)
    return [_real(model(**given, use_cache=use_cache).logits, model, inputs) for use_cache in (False, True)]


@torch.no_grad()
def pieces(model: Any, inputs: dict[str, Any]) -> Any:
    """Several tokens, then several more on the cache of the first: an hfkv cache, where the model is patched."""
    first = model(**_given(model, inputs), past_key_values=_new_cache(model), use_cache=True)
    more = _several_ids(model, inputs, NUM_CONTINUED)
    cache = first.past_key_values
    if model.config.is_encoder_decoder:
        second = model(**inputs | {"decoder_input_ids": more}, past_key_values=cache, use_cache=True)
    else:
        mask = inputs["attention_mask"]
        mask = torch.cat((mask, mask.new_ones(len(mask), NUM_CONTINUED)), dim=1)
        second = model(input_ids=more, attention_mask=mask, past_key_values=cache, use_cache=True)
    return _real(first.logits, model, inputs), second.logits


def _new_cache(model: Any) -> Any:
    config = model.config.get_text_config(decoder=True)
    own = model.hfkv.new_cache() if "hfkv" in vars(model) else DynamicCache(config=config)
    return EncoderDecoderCache(own, DynamicCache()) if model.config.is_encoder_decoder else own


def prompted_decoder(model: Any, inputs: dict[str, Any]) -> Any:
    """Several decoder tokens to begin with."""
    ids = _several_ids(model, inputs, NUM_DECODER_TOKENS)
    return generate(model, inputs | {"decoder_input_ids": ids})


MODES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "greedy": greedy,
    "uncached": uncached,
    "sampled beams": sampled_beams,
    "samples": samples,
    "lookup": lookup,
    "assisted": assisted,
    "hidden states": hidden_states,
    "attentions": attentions,
    "whole": whole,
    "pieces": pieces,
    "prompted decoder": prompted_decoder,
}


def outcome(mode: str, model: Any, inputs: dict[str, Any]) -> Any:
    """What a mode gives, or the error it raises."""
    torch.manual_seed(0)
    try:
        return MODES[mode](model, {name: value.clone() for name, value in inputs.items()})
    except ERRORS as error:
        return error
