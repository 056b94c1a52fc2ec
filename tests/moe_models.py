"""Tiny models with experts, and what they say of one prompt."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo import models

IDS = torch.arange(3, 21).view(2, 9)
MASK = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])


def model_of(model_type: str) -> Any:
    return models.build(next(a for a in models.architectures() if a.model_type == model_type))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
