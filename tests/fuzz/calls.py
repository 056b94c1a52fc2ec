"""Makes the call that a case describes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.fuzz.cases import Case
from tests.zoo import tokens
from tests.zoo.outcomes import ERRORS, without_padding

NUM_SOUND = 64  # frames that the tiny Whisper takes


class Streamed(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.clone())

    def end(self) -> None:
        self.parts.append("end")


class Biased(LogitsProcessor):
    """Likes every third token, depending on the last one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        liked = (torch.arange(scores.shape[1]) + input_ids[:, -1:]) % 3 == 0
        return scores + 0.5 * liked


class StopsAt(StoppingCriteria):
    """Stops a row after a token divisible by 7."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 0


def half_allowed(batch_id: int, text: torch.Tensor) -> list[int]:
    """About half of the tokens, others after each token."""
    return list(range(3 + int(text[-1]) % 2, tokens.VOCAB_SIZE, 2))


def prompt_of(case: Case) -> dict[str, torch.Tensor]:
    """Ids and mask, left-padded."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(tokens.FIRST_TOKEN, tokens.LAST_TOKEN + 1, (case.rows, case.length), generator=generator)
    if "prompt_lookup_num_tokens" in case.options:  # something to look up
        half = case.length // 2
        ids[:, case.length - half :] = ids[:, :half]
    mask = torch.ones_like(ids)
    for row, pad in enumerate(case.pads):
        ids[row, :pad] = tokens.PAD_TOKEN
        mask[row, :pad] = 0
    return {"input_ids": ids} if "no mask" in case.objects else {"input_ids": ids, "attention_mask": mask}


def run(model: Any, case: Case, new_cache: Any, assistant: Any, is_stock: bool = False) -> Any:
    """The outcome of a case.

    Args:
        model: stock or patched.
        case: what to ask.
        new_cache: a function that makes a cache of the user's own.
        assistant: a model for assisted decoding.
        is_stock: whether the model is stock. Its assisted decoding gives the whole text to a cache that holds the
            beginning, which then holds that twice; what a second turn should give is what it gives without a cache.
            (Of an encoder-decoder hfkv has no cache of its own around, and does as stock does.)
    """
    try:
        return _run(model, case, new_cache, assistant, is_stock)
    except ERRORS as error:
        return error


def _run(model: Any, case: Case, new_cache: Any, assistant: Any, is_stock: bool = False) -> Any:
    is_encoder_decoder = model.config.is_encoder_decoder
    inputs = _inputs(model, case)
    given: dict[str, Any] = dict(case.options)
    if "processor" in case.objects:
        given["logits_processor"] = LogitsProcessorList([Biased()])
    if "criteria" in case.objects:
        given["stopping_criteria"] = StoppingCriteriaList([StopsAt()])
    if "prefix function" in case.objects:
        given["prefix_allowed_tokens_fn"] = half_allowed
    if "assistant" in case.objects:
        given["assistant_model"] = assistant
    if "negative" in case.objects:
        given["negative_prompt_ids"] = torch.flip(prompt_of(case)["input_ids"], dims=(1,))
    if is_encoder_decoder and case.decoder_tokens:
        generator = torch.Generator().manual_seed(case.seed + 1)
        shape = (case.rows, case.decoder_tokens)
        inputs["decoder_input_ids"] = torch.randint(3, 89, shape, generator=generator)
    cache = new_cache() if case.cache == "own" else None
    is_assisted = "assistant" in case.objects or "prompt_lookup_num_tokens" in case.options
    reads_twice = is_assisted and not is_encoder_decoder
    outcomes = []
    for turn in range(case.turns):
        streamer = Streamed() if "streamer" in case.objects else None
        torch.manual_seed(case.seed + turn)
        extra = {"streamer": streamer} if streamer else {}
        if cache is not None:
            extra["past_key_values"] = cache
        output = model.generate(**inputs, **given, **extra)
        if case.cache == "returned":
            cache = output.past_key_values
        if is_stock and reads_twice:
            cache = None
        if isinstance(output, torch.Tensor):
            output = {"sequences": output}
        outcome = {name: value for name, value in output.items() if name != "past_key_values"}
        if not is_encoder_decoder:
            outcome = without_padding(outcome, inputs.get("attention_mask"))
        if streamer:
            outcome["streamed"] = streamer.parts
        outcomes.append(outcome)
        if turn + 1 < case.turns:
            inputs = _next_inputs(case, inputs, output["sequences"], is_encoder_decoder)
    return outcomes


def _inputs(model: Any, case: Case) -> dict[str, torch.Tensor]:
    inputs = prompt_of(case)
    if model.main_input_name == "input_features":
        generator = torch.Generator().manual_seed(case.seed)
        sound = torch.randn(case.rows, model.config.num_mel_bins, NUM_SOUND, generator=generator)
        return {"input_features": sound.to(model.dtype)}
    if "embeds" in case.objects and not model.config.is_encoder_decoder:
        embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
        return {**inputs, "inputs_embeds": embeds}
    return inputs


def _next_inputs(
    case: Case, inputs: dict[str, torch.Tensor], sequences: torch.Tensor, is_encoder_decoder: bool
) -> dict[str, torch.Tensor]:
    """The text so far, and three tokens more."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    more = torch.randint(tokens.FIRST_TOKEN, tokens.LAST_TOKEN + 1, (len(sequences), 3), generator=generator)
    text = torch.cat((sequences, more), dim=1)
    if is_encoder_decoder:
        return {**inputs, "decoder_input_ids": text}
    if "inputs_embeds" in inputs:
        return {**inputs, "input_ids": text}
    mask = inputs.get("attention_mask")
    if mask is None:
        return {"input_ids": text}
    ones = mask.new_ones(len(mask), text.shape[1] - mask.shape[1])
    return {"input_ids": text, "attention_mask": torch.cat((mask, ones), dim=1)}


def stock_cache(model: Any) -> Any:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))
    return cache
