"""The error of the logits in half precision: of texts that are the same for all, token by token."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hfkv
from tests.fuzz.calls import prompt_of
from tests.fuzz.cases import Case
from tests.fuzz.subjects import KVS, model_of

NUM_CASES = 4
NEW_TOKENS = 6


class Forced(LogitsProcessor):
    """Writes a text of its own, whatever the model says."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.rng.randint(3, 88)] = 0
        return forced


def errors_in_half_precision(name: str, way: str) -> tuple[float, float]:
    """Largest errors of the logits against stock in fp32, of stock code and of hfkv, over a few calls.

    Args:
        name: see `subjects.NAMES`.
        way: a dtype of the weights, or "autocast" to bf16.
    """
    exact = model_of(name)
    wanted = [_logits(exact, seed) for seed in range(NUM_CASES)]
    stock = exact if way == "autocast" else exact.to(getattr(torch, way))
    ours = copy.deepcopy(stock)
    largest = [0.0, 0.0]
    with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext():
        for kv in KVS[::3]:
            with hfkv.patch(ours, kv):
                for seed, logits in enumerate(wanted):
                    for i, model in enumerate((stock, ours)):
                        largest[i] = max(largest[i], (_logits(model, seed) - logits).abs().max().item())
    return largest[0], largest[1]


def _logits(model: Any, seed: int) -> torch.Tensor:
    rng = random.Random(seed)
    length = rng.randint(3, 14)
    pads = tuple(rng.choice((0, rng.randint(0, length - 1))) for _ in range(rng.randint(1, 3)))
    inputs = prompt_of(Case(seed, pads, length, {}))
    chunk = {"prefill_chunk_size": 3} if rng.random() < 0.3 and not model.config.is_encoder_decoder else {}
    output = model.generate(
        **inputs,
        **chunk,
        do_sample=False,
        num_beams=rng.choice((1, 1, 2)),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        logits_processor=LogitsProcessorList([Forced(seed)]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits).float()
