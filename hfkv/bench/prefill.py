"""The suite ``prefill``: a whole prompt to its first new token, of ``generate()`` on a model of the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hfkv.bench.caches import PromptSuite
from hfkv.bench.contenders import DYNAMIC, Contender
from hfkv.bench.gate import Errors
from hfkv.bench.lane import Lane
from hfkv.bench.models import model_of
from hfkv.bench.prompt import Prompt, StepClock
from hfkv.bench.suite import Cell


class PrefillLane(Lane):
    """One contender's model, over the same weights as everyone's.

    Args:
        contender: whose.
        prompt: what it reads.
    """

    def __init__(self, contender: Contender, prompt: Prompt) -> None:
        super().__init__(contender, prompt.model.config.num_hidden_layers)
        self.prompt = prompt
        self.model = model_of(contender, prompt.model)
        self.logits: torch.Tensor | None = None

    def open(self) -> None:
        """Reads the prompt a first time; every turn does so anew."""
        self.turn()

    def check(self) -> Errors:
        """The first new token's logits against DynamicCache's."""
        assert self.logits is not None
        return self.prompt.check(self.contender, self.logits)

    def turn(self) -> list[float]:
        """The prompt once, in ms."""
        return self.read(self.prompt.ids, self.prompt.mask)

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        """A prompt `[B, T]` with its mask to the first new token, in ms."""
        clock = StepClock()
        self.cache = None
        given: dict[str, Any] = {}
        if not self.contender.is_ours and self.contender.name != DYNAMIC and self.contender.new_cache is not None:
            given["past_key_values"] = self.contender.new_cache(self.model, ids.shape[1] + 1)
        output: Any = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
        self.cache, self.logits = output.past_key_values, output.logits[0]
        return clock.milliseconds


class PrefillSuite(PromptSuite):
    """The suite."""

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Models over the same weights, which read the same prompt."""
        self.check_memory(cell)
        lengths = self.setting.ragged or (cell.context,) * self.batch
        prompt = Prompt.draw(self.model, lengths, self.setting.seed)
        return lambda contender: PrefillLane(contender, prompt)
