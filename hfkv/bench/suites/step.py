"""The suite ``step``: whole decode steps of ``generate()`` on a model of the shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import CompileConfig

from hfkv.bench.contenders import NO_CACHE, Contender
from hfkv.bench.gate import Errors
from hfkv.bench.lane import Lane
from hfkv.bench.models import weights_read
from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell, ModelSuite
from hfkv.bench.suites.prompt import GenerateLane, Prompt
from hfkv.bench.tokens import Tokens, held_bytes
from hfkv.bench.turns import LEAST_TURNS, Turns

# Timed steps of one call of generate; the first, which comes with the setting up, is not timed.
STEPS_A_TURN = 4
MOST_TURNS = 40
# A step without a cache reads the whole text again: beyond so many tokens in all it is not waited for.
MOST_UNCACHED = 2048
# Tokens besides those of the turns: the check's, and the warm-up's.
SPARE_TOKENS = 16


def step_turns(setting: Setting, least: int = LEAST_TURNS) -> Turns:
    """How often contenders take turns of several steps each."""
    count = None if setting.steps is None else -(-setting.steps // STEPS_A_TURN)
    return Turns(count, setting.seconds, least, MOST_TURNS, setting.busy)


@dataclass(eq=False)
class StepLane(GenerateLane):
    """One contender's model, over the same weights as everyone's, and its cache with room for so many turns.

    The cache is filled with tokens in place of the prompt's, of which the last has not been read yet.
    """

    tokens: Tokens
    turns: int

    warm_ups = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.room = self.tokens.count + self.turns * (STEPS_A_TURN + 1) + SPARE_TOKENS
        self.ids = self.prompt.ids
        if self.contender.is_compiled and self.ids.device.type == "cpu":
            compiling = CompileConfig()
            compiling._compile_all_devices = True  # by itself transformers compiles on accelerators only
            self.model.generation_config.compile_config = compiling

    def open(self) -> None:
        self.ids = self.prompt.ids
        if self.contender.new_cache is not None:
            self.cache = self.tokens.fill(self.contender.new_cache(self.model, self.room), self.layers, self.room)

    def check(self) -> Errors:
        """One forward's logits against DynamicCache's."""
        if self.contender.new_cache is None:
            return Errors()  # it reads the tokens themselves, and the others' caches hold random numbers
        seen = torch.ones_like(self.ids)
        forward = self.model(input_ids=self.ids[:, -1:], attention_mask=seen, past_key_values=self.cache)
        self.ids = torch.cat((self.ids, self.ids[:, :1]), dim=1)
        return self.prompt.check(self.contender, forward.logits[:, -1])

    def turn(self) -> list[float]:
        """A few steps of `generate`, in ms."""
        given = {"use_cache": False} if self.cache is None else {"past_key_values": self.cache}
        self.ids, times = self.generate(self.ids, torch.ones_like(self.ids), STEPS_A_TURN + 1, **given)
        return times[1:]

    def read_bytes(self) -> int:
        """What a step must read: the cache and the weights."""
        return held_bytes(self.cache, self.layers) + weights_read(self.model, self.ids.shape[0])


class StepSuite(ModelSuite):
    """The suite."""

    def has_graphs(self, cell: Cell) -> bool:
        return True

    def turns(self, cell: Cell) -> Turns:
        return step_turns(self.setting)

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        if contender.name == NO_CACHE and self.batch * cell.context > MOST_UNCACHED:
            return f"a step without a cache reads the whole text again: run for {MOST_UNCACHED:,} tokens at most"
        return super().reason(contender, cell)

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Models over the same weights, with caches of the same tokens."""
        tokens, room = self.tokens(cell), self.turns(cell).room
        prompt = Prompt.draw(self.model, (cell.context + 1,) * self.batch, self.setting.seed)
        return lambda contender: StepLane(contender, prompt, tokens, room)
