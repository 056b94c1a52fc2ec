"""Prompts with an image, for the models that show by their errors how they want it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from .configs import IMAGE_SIZE
from .models import NUM_PADDED, prompt
from .outcomes import ERRORS

MAX_IMAGE_TOKENS = 40
# What transformers says where the prompt has another number of image tokens than the vision model made features.
_COUNTS = (r"tokens: \d+, features:? (\d+)", r"do not match.*torch.Size\(\[(\d+), \d+\]\)")
_GRID = 2  # patches each way


def image_prompt(model: Any) -> dict[str, torch.Tensor] | None:
    """A prompt of two rows, the first left-padded, each with an image after its first tokens.

    Args:
        model: a model from `build`.

    Returns:
        Inputs that a forward of the model takes, or None where none of the usual layouts of pixels fits.
    """
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if token is None or model.config.is_encoder_decoder:
        return None
    for pixels in _layouts(model):
        count = 4
        for _ in range(2):
            inputs = _with_image(model, token, count, pixels)
            try:
                with torch.no_grad():
                    model(**inputs)
                return inputs
            except ERRORS as error:
                text = " ".join(str(error).split())
                found = next((match for pattern in _COUNTS if (match := re.search(pattern, text))), None)
                if found is None:
                    break
                count = int(found[1]) // 2
            if not 0 < count <= MAX_IMAGE_TOKENS:
                break
    return None


def _layouts(model: Any) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        vision = model.config.vision_config
        frames = getattr(vision, "temporal_patch_size", None) or 1
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
        width = channels * frames * getattr(vision, "patch_size", 14) ** 2
        pixels = torch.randn(2 * _GRID**2, width, generator=generator)
        return [{"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, _GRID, _GRID]] * 2)}]
    plain = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 2)
    layouts = [{"pixel_values": plain}, {"pixel_values": plain[:, None]}]
    return layouts + [{**layout, "image_sizes": sizes} for layout in layouts]


def _with_image(model: Any, token: int, count: int, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    text = prompt(model)
    ids, mask = text["input_ids"], text["attention_mask"]
    first = NUM_PADDED + 1
    image = torch.full((2, count), token)
    ids = torch.cat((ids[:, :first], image, ids[:, first:]), dim=1)
    mask = torch.cat((mask[:, :first], torch.ones_like(image), mask[:, first:]), dim=1)
    kinds = (ids == torch.tensor(token)).long()
    names = inspect.signature(model.forward).parameters
    given = {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in names}
    return {"input_ids": ids, "attention_mask": mask, **given, **pixels}
