"""Inputs of the architectures that no rule reaches, by model type, and the inputs that a model is asked with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import tokens
from .configs import IMAGE_SIZE
from .images import image_prompt
from .models import prompt

_BATCH, _LENGTH = 2, 9
_NUM_SAMPLES = 192  # three steps of the tiny codec
_FRAMES = 4


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What a forward or `generate` of the model is given.

    Args:
        model: a model from `build`.

    Returns:
        The inputs of `OWN`, else text and an image where one of the usual layouts fits, else as `prompt`.
    """
    own = OWN.get(model.config.model_type)
    if own is not None:
        return own(model, torch.Generator().manual_seed(0))
    pictured = image_prompt(model)
    return prompt(model) if pictured is None else pictured


def _text(generator: torch.Generator, rows: int = _BATCH) -> dict[str, torch.Tensor]:
    shape = (rows, _LENGTH)
    ids = torch.randint(tokens.FIRST_TOKEN, tokens.LAST_TOKEN + 1, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(_BATCH, _LENGTH, dtype=torch.long)}


def _images(generator: torch.Generator, *each: int) -> torch.Tensor:
    return torch.randn(_BATCH, *each, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def _codebooks(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return _text(generator, _BATCH * model.config.num_codebooks)


def _audio_codes(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(_BATCH, 1, _NUM_SAMPLES, generator=generator)}


def _patches(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows and columns of 16 x 16 patches, and their pixels."""
    places = torch.arange(1.0, 9.0)[None, :, None].expand(_BATCH, 8, 2)
    pixels = torch.randn(_BATCH, 8, 3 * 16 * 16, generator=generator)
    return {"flattened_patches": torch.cat((places, pixels), dim=-1), "attention_mask": torch.ones(_BATCH, 8)}


def _queried(model: Any, generator: torch.Generator, *frames: int) -> dict[str, torch.Tensor]:
    """An image as so many tokens as the model has queries."""
    text = _text(generator)
    count = model.config.num_query_tokens * math.prod(frames)
    config = model.config
    token = config.video_token_index if frames else config.image_token_index
    ids = torch.full((_BATCH, count), token)
    image = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = {name: torch.cat((image[name], text[name]), dim=1) for name in text}
    given["pixel_values"] = _images(generator, *frames)
    if hasattr(model.config.qformer_config, "vocab_size") and "instruct" in model.config.model_type:
        given["qformer_input_ids"] = _text(generator)["input_ids"]
    return given


def _boxed(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    boxes = torch.rand(_BATCH, _LENGTH, 4, generator=generator).sort(dim=-1).values
    return {**_text(generator), "bbox": boxes}


def _marked(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An image in the second token and those behind it."""
    is_image = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
    is_image[:, 1 : 1 + model.config.latent_query_num] = 1
    return {**_text(generator), "pixel_values": _images(generator), "image_embeds_position_mask": is_image}


def _heard(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Text beside sound that is longer than any of it."""
    frames = torch.randn(_BATCH, model.config.audio_config.num_mel_bins, 256, generator=generator)
    return {**_text(generator), "input_features": frames}


def _interleaved(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    seen = torch.ones(_BATCH, _LENGTH, 1, dtype=torch.long)
    return {**_text(generator), "pixel_values": _images(generator, 1), "image_attention_mask": seen}


OWN: dict[str, Callable[[Any, torch.Generator], dict[str, torch.Tensor]]] = {
    "blip-2": _queried,
    "dia": lambda model, generator: _text(generator),
    "idefics": _interleaved,
    "instructblip": _queried,
    "instructblipvideo": lambda model, generator: _queried(model, generator, _FRAMES),
    "kosmos-2": _marked,
    "kyutai_speech_to_text": _audio_codes,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "pix2struct": _patches,
    "udop": _boxed,
    "voxtral_realtime": _heard,
}
