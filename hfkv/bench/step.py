"""The suite ``step``: whole decode steps of ``generate()`` on a model of the shape."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from hfkv.bench.contenders import DYNAMIC, Contender
from hfkv.bench.gate import Errors, logit_errors
from hfkv.bench.shapes import share_weights, weights_read
from hfkv.bench.tokens import Tokens, allocated_bytes, bus_bytes, held_bytes
from hfkv.patches.patch import patch

# Timed steps of one call of generate; the first, which comes with the setting up, is not timed.
STEPS_A_TURN = 4
MOST_TURNS = 40
# A step without a cache reads the whole text again: beyond so many tokens in all it is not waited for.
MOST_UNCACHED = 2048
# Tokens besides those of the turns: the check's, and the warm-up's.
SPARE_TOKENS = 16


class StepClock:
    """A streamer that notes when `generate` handed over the prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []  # seconds

    def put(self, value: torch.Tensor) -> None:
        """The tokens are on the host by now: the device is done with them."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""

    @property
    def milliseconds(self) -> list[float]:
        """From the prompt to the first token, and from each to the next."""
        return [1e3 * (later - earlier) for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass
class StepTask:
    """What all contenders of one context share.

    Attributes:
        model: with the weights.
        tokens: what caches are filled with.
        ids: random token ids `[B, T + 1]`; the last has not been read yet.
        standard: DynamicCache's logits `[B, V]`, once it has been checked; it is the first.
    """

    model: PreTrainedModel
    tokens: Tokens
    ids: torch.Tensor
    standard: torch.Tensor | None = None


class StepLane:
    """One contender's model, over the same weights as everyone's, and its cache.

    Args:
        contender: whose.
        task: what it shares with the others.
        turns: turns it has to have room for.
    """

    def __init__(self, contender: Contender, task: StepTask, turns: int) -> None:
        self.contender = contender
        self.name = contender.name
        self.task = task
        self.room = task.tokens.count + turns * (STEPS_A_TURN + 1) + SPARE_TOKENS
        self.cache: Any = None
        self.ids = task.ids
        self.model = share_weights(task.model)
        self.rotary: Any = None
        if contender.is_ours:
            self.rotary = patch(self.model, contender.kv, graphs=contender.graphs).rotary
        if contender.is_compiled and task.ids.device.type == "cpu":
            compiling = CompileConfig()
            compiling._compile_all_devices = True  # by itself transformers compiles on accelerators only
            self.model.generation_config.compile_config = compiling

    def open(self) -> None:
        """Makes the cache and fills it."""
        self.ids = self.task.ids
        if self.contender.new_cache is not None:
            self.cache = self.contender.new_cache(self.model, self.room)
            self.task.tokens.fill(self.contender, self.cache, self._num_layers, self.room)

    def check(self) -> Errors:
        """One forward's logits against DynamicCache's."""
        if self.contender.new_cache is None:
            return Errors()  # it reads the tokens themselves, and the others' caches hold random numbers
        seen = torch.ones_like(self.ids)
        forward = self.model(input_ids=self.ids[:, -1:], attention_mask=seen, past_key_values=self.cache)
        logits = forward.logits[:, -1]
        self.ids = torch.cat((self.ids, self.ids[:, :1]), dim=1)
        if self.contender.name == DYNAMIC:
            self.task.standard = logits
        assert self.task.standard is not None
        return check_logits(self.contender, self.model, logits, self.task.standard)

    def warm_up(self) -> None:
        """A turn that is not timed."""
        self.turn()

    def turn(self) -> list[float]:
        """A few steps of `generate`, in ms."""
        clock = StepClock()
        given = {"use_cache": False} if self.cache is None else {"past_key_values": self.cache}
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=STEPS_A_TURN + 1,
            do_sample=False,
            streamer=clock,
            **given,
        )
        return clock.milliseconds[1:]

    def held_bytes(self) -> int:
        """Of all layers."""
        return 0 if self.cache is None else held_bytes(self.cache, self._num_layers)

    def allocated_bytes(self) -> int:
        """Of all layers."""
        return 0 if self.cache is None else allocated_bytes(self.cache, self._num_layers)

    def read_bytes(self) -> int:
        """What a step must read: the cache and the weights."""
        return self.held_bytes() + weights_read(self.model, self.ids.shape[0])

    def bus_bytes(self) -> int | None:
        """What of all layers has to come from host memory."""
        return bus_bytes(self.cache, self._num_layers)

    def close(self) -> None:
        """Lets go of the cache."""
        self.cache = None

    @property
    def _num_layers(self) -> int:
        return self.model.config.num_hidden_layers


def check_logits(contender: Contender, model: PreTrainedModel, logits: torch.Tensor, standard: torch.Tensor) -> Errors:
    """A contender's logits against DynamicCache's: a lossless one of hfkv's must agree, any of hfkv's be finite."""
    is_lossless = contender.kv is not None and contender.kv.is_lossless
    errors = logit_errors(logits, standard, is_lossless, model.config.num_hidden_layers, model.dtype)
    return errors if contender.is_ours else replace(errors, wrong=None)
