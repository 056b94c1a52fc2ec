"""The suite ``reuse``: a prefix that has been read before and a new question behind it, to the first new token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hfkv.bench.caches import PromptSuite
from hfkv.bench.contenders import Contender
from hfkv.bench.lane import Lane
from hfkv.bench.prefill import PrefillLane
from hfkv.bench.prompt import Prompt
from hfkv.bench.suite import Cell

# Tokens behind the prefix, new in every turn.
QUESTION = 128


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


class ReuseSuite(PromptSuite):
    """The suite."""

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Models over the same weights, which read the same prefix and questions."""
        self.check_memory(cell)
        prompt = Prompt.draw(self.model, (cell.context + QUESTION,) * self.batch, self.setting.seed)
        return lambda contender: ReuseLane(contender, prompt, keep_first=self.setting.steps == 1)
