"""The suites ``prefill`` and ``reuse``: a whole prompt to its first new token, of ``generate()``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hfkv.bench.contenders import DYNAMIC, NO_CACHE, Contender
from hfkv.bench.gate import Errors
from hfkv.bench.lane import Lane
from hfkv.bench.suite import Cell, ModelSuite
from hfkv.bench.suites.prompt import GenerateLane, Prompt

# Tokens behind the prefix, new in every turn.
QUESTION = 128


@dataclass(eq=False)
class PrefillLane(GenerateLane):
    """One contender's model, which reads the prompt in every turn."""

    logits: Any = field(default=None, init=False)

    def open(self) -> None:
        """Reads the prompt a first time."""
        self.turn()

    def check(self) -> Errors:
        """The first new token's logits against DynamicCache's."""
        return self.prompt.check(self.contender, self.logits)

    def turn(self) -> list[float]:
        """The prompt once, in ms."""
        return self.read(self.prompt.ids, self.prompt.mask)

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        """A prompt `[B, T]` with its mask to the first new token, in ms."""
        self.cache, given = None, {"return_dict_in_generate": True, "output_logits": True}
        if not self.contender.is_ours and self.contender.name != DYNAMIC and self.contender.new_cache is not None:
            given["past_key_values"] = self.contender.new_cache(self.model, ids.shape[1] + 1)
        output, times = self.generate(ids, mask, 1, **given)
        self.cache, self.logits = output.past_key_values, output.logits[0]
        return times


@dataclass(eq=False)
class ReuseLane(PrefillLane):
    """One contender's model; with reuse it has read the prefix before its first turn, without it reads it every time.

    With `keep_first` the reading of `open` is the first turn where nothing is shared: a long prompt takes minutes.
    """

    keep_first: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self._generator = torch.Generator(self.prompt.ids.device).manual_seed(1)
        self._first: list[float] | None = None

    def open(self) -> None:
        """Reads the prefix, where it is kept, and then the prompt a first time."""
        if self.contender.shares:
            prefix = self.prompt.ids[:, :-QUESTION]
            self.generate(prefix, torch.ones_like(prefix), 1)
        self._first = self._read(self.prompt.ids)

    def turn(self) -> list[float]:
        """The prompt with another question, in ms."""
        if self._first is not None and self.keep_first and not self.contender.shares:
            first, self._first = self._first, None
            return first
        prefix = self.prompt.ids[:, :-QUESTION]
        size, vocabulary = (len(prefix), QUESTION), self.model.config.vocab_size
        question = torch.randint(vocabulary, size, device=prefix.device, generator=self._generator)
        return self._read(torch.cat((prefix, question), dim=1))

    def _read(self, ids: torch.Tensor) -> list[float]:
        shares = self.contender.shares
        before = self.model.hfkv.reuse_stats().tokens_reused if shares else 0
        times = self.read(ids, torch.ones_like(ids))
        if shares and self.model.hfkv.reuse_stats().tokens_reused - before < ids.numel() - 2 * QUESTION * len(ids):
            raise MemoryError(f"the budget of {self.contender.name} does not hold the prefix: say +reuse:SIZE")
        return times

    def close(self) -> None:
        """Lets go of the cache and of the pages kept."""
        super().close()
        if self.contender.shares:
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
