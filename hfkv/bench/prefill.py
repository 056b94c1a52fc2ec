"""The suites ``prefill`` and ``reuse``: a whole prompt to its first new token, of ``generate()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hfkv.bench.caches import ModelSuite
from hfkv.bench.contenders import DYNAMIC, NO_CACHE, Contender
from hfkv.bench.gate import Errors
from hfkv.bench.lane import Lane
from hfkv.bench.models import model_of
from hfkv.bench.prompt import Prompt, StepClock
from hfkv.bench.suite import Cell

# Tokens behind the prefix, new in every turn.
QUESTION = 128


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


class ReuseLane(PrefillLane):
    """One contender's model; with reuse it has read the prefix before its first turn, without it reads it every time.

    Args:
        contender: whose.
        prompt: the prefix and a first question.
        keep_first: whether the reading of `open` counts as the first turn of a contender that shares nothing: a long
            prompt takes minutes.
    """

    def __init__(self, contender: Contender, prompt: Prompt, keep_first: bool) -> None:
        super().__init__(contender, prompt)
        self.question = prompt.ids[:, -QUESTION:]
        self._generator = torch.Generator(prompt.ids.device).manual_seed(1)
        self._keep_first = keep_first
        self._first: list[float] | None = None

    @property
    def shares(self) -> bool:
        """Whether its model keeps prefixes between calls."""
        return self.contender.kv is not None and self.contender.kv.reuse is not None

    def open(self) -> None:
        """Reads the prefix, where it is kept, and then the prompt a first time."""
        if self.shares:
            prefix = self.prompt.ids[:, :-QUESTION]
            self.model.generate(prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=1, do_sample=False)
        self._first = self._read(self.prompt.ids)

    def turn(self) -> list[float]:
        """The prompt with another question, in ms."""
        if self._first is not None and self._keep_first and not self.shares:
            first, self._first = self._first, None
            return first
        prompt = self.prompt.ids
        question = torch.randint(
            self.model.config.vocab_size, self.question.shape, device=prompt.device, generator=self._generator
        )
        return self._read(torch.cat((prompt[:, :-QUESTION], question), dim=1))

    def _read(self, ids: torch.Tensor) -> list[float]:
        before = self.model.hfkv.reuse_stats().tokens_reused if self.shares else 0
        times = self.read(ids, torch.ones_like(ids))
        if self.shares and self.model.hfkv.reuse_stats().tokens_reused - before < ids.numel() - 2 * QUESTION * len(ids):
            raise MemoryError(f"the budget of {self.contender.name} does not hold the prefix: say +reuse:SIZE")
        return times

    def close(self) -> None:
        """Lets go of the cache and of the pages kept."""
        super().close()
        if self.shares:
            self.model.hfkv.clear_reuse()


class PromptSuite(ModelSuite):
    """The suites of whole prompts."""

    least_turns = 3  # they take long

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        """Why a contender is not run: it would be DynamicCache again."""
        if contender.name == NO_CACHE:
            return "a prompt is read at the same cost without a cache: see the suite step"
        if contender.is_compiled:
            return "transformers compiles decode steps only, and reads the prompt as it does for DynamicCache"
        return super().reason(contender, cell)

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Models over the same weights, which read the same prompt, or the same prefix and questions."""
        self.check_memory(cell)
        setting, is_reuse = self.setting, self.setting.suite == "reuse"
        lengths = setting.ragged or (cell.context + QUESTION * is_reuse,) * self.batch
        prompt = Prompt.draw(self.model, lengths, setting.seed)
        if is_reuse:
            return lambda contender: ReuseLane(contender, prompt, keep_first=setting.steps == 1)
        return lambda contender: PrefillLane(contender, prompt)
