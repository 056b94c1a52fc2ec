"""`Prompt`: random tokens for whole models, the clock of `generate`, and the check of logits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfkv.bench.contenders import DYNAMIC, Contender
from hfkv.bench.gate import Errors, logit_errors
from hfkv.bench.lane import Lane
from hfkv.bench.models import model_of


class StepClock:
    """A streamer that notes when `generate` handed over the prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []  # seconds

    def put(self, value: torch.Tensor) -> None:
        """The tokens are on the host by now: the device is done with them."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The end of the text needs no note."""

    @property
    def milliseconds(self) -> list[float]:
        """The time from the prompt to the first token, and from each to the next."""
        return [1e3 * (later - earlier) for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass
class Prompt:
    """A left-padded batch of random tokens `[B, T]` that all contenders read, and its mask, 1 where one is real."""

    model: PreTrainedModel
    ids: torch.Tensor
    mask: torch.Tensor
    standard: torch.Tensor | None = None  # DynamicCache's logits `[B, V]`, once it has been checked, as the first

    @classmethod
    def draw(cls, model: PreTrainedModel, lengths: Sequence[int], seed: int) -> Prompt:
        """A prompt whose rows have so many real tokens."""
        device = model.device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (len(lengths), max(lengths))
        ids = torch.randint(model.config.vocab_size, shape, device=device, generator=generator)
        columns = torch.arange(max(lengths), device=device)
        mask = columns >= max(lengths) - torch.tensor(lengths, device=device)[:, None]
        return cls(model, ids * mask, mask.long())

    def check(self, contender: Contender, logits: torch.Tensor) -> Errors:
        """A contender's logits `[B, V]` against DynamicCache's; MemoryError where DynamicCache ran out of memory."""
        if contender.name == DYNAMIC:
            self.standard = logits
        if self.standard is None:
            raise MemoryError("DynamicCache's, whose logits are the standard; take fewer tokens or a smaller --batch")
        return logit_errors(contender, logits, self.standard, self.model.config.num_hidden_layers, self.model.dtype)


@dataclass(eq=False)
class GenerateLane(Lane):
    """One contender's model, over the same weights as everyone's, that goes on from a prompt."""

    prompt: Prompt

    def __post_init__(self) -> None:
        self.layers = self.prompt.model.config.num_hidden_layers
        self.model = model_of(self.contender, self.prompt.model)

    def generate(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, **given: Any) -> tuple[Any, list[float]]:
        """What `generate` makes of tokens `[B, T]`, and the time in ms of each new one."""
        clock, given = StepClock(), {**given, "max_new_tokens": new_tokens, "do_sample": False}
        return self.model.generate(ids, attention_mask=mask, streamer=clock, **given), clock.milliseconds
