"""The suite ``host``: what a forward costs in Python and dispatch, on a model so small that nothing else costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hfkv.bench.contenders import DYNAMIC, NO_CACHE, Contender
from hfkv.bench.gate import Errors
from hfkv.bench.lane import Lane
from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell, ModelSuite
from hfkv.bench.suites.prompt import GenerateLane, Prompt
from hfkv.bench.turns import Turns

# Forwards of one turn, of which the least counts: whatever disturbs one does not disturb all.
FORWARDS = 16
MOST_TURNS = 40


@dataclass(eq=False)
class HostLane(GenerateLane):
    """One contender's model, over the same weights as everyone's, and a cache that has read the prompt."""

    room: int
    firsts: list[float] = field(default_factory=list, init=False)  # of first tokens, in ms

    warm_ups = 2

    def open(self) -> None:
        """Reads the prompt, and then the first of the tokens that steps are of."""
        assert self.contender.new_cache is not None
        self.cache = self.contender.new_cache(self.model, self.room)
        self._mask, self._seen = self.prompt.mask, self.prompt.ids.shape[1]
        self._token = self.prompt.ids[:, :1]
        self._logits = self._forward(self.prompt.ids)

    def check(self) -> Errors:
        """The prompt's last logits against DynamicCache's."""
        return self.prompt.check(self.contender, self._logits)

    def turn(self) -> list[float]:
        """The least CPU time of a few forwards of one token, in ms; and that of the first token of `generate`."""
        times = []
        for _ in range(FORWARDS):
            self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), dim=1)
            begin = time.process_time()
            self._forward(self._token)
            times.append(1e3 * (time.process_time() - begin))
        given = {} if self.contender.is_ours else {"past_key_values": self.contender.new_cache(self.model, self.room)}  # type: ignore[misc]
        begin = time.process_time()
        self.generate(self.prompt.ids, self.prompt.mask, 1, **given)
        self.firsts.append(1e3 * (time.process_time() - begin))
        return [min(times)]

    def counted(self) -> dict[str, Any]:
        """The least CPU time of a first token."""
        return {"first_ms": min(self.firsts)}

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        given = {} if bool(self.prompt.mask.all()) else {"attention_mask": self._mask}
        logits: torch.Tensor = self.model(ids, past_key_values=self.cache, use_cache=True, **given).logits
        return logits[:, -1]


class HostSuite(ModelSuite):
    """The suite; it runs in one thread, whose CPU time is taken."""

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(1)  # `run` sets it back
        super().__init__(setting)

    def bases(self, cell: Cell) -> tuple[str, ...]:
        return (DYNAMIC,)

    def turns(self, cell: Cell) -> Turns:
        count = None if self.setting.steps is None else -(-self.setting.steps // FORWARDS)
        return Turns(count, self.setting.seconds, most=MOST_TURNS, busy=self.setting.busy)

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        if contender.name == NO_CACHE or contender.is_compiled or contender.graphs:
            return "what it costs is no cache's: see the suite step"
        return contender.reason

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Models over the same weights, which read the same prompt."""
        self.check_memory(cell)
        prompt = Prompt.draw(self.model, self.setting.ragged or (cell.context,) * self.batch, self.setting.seed)
        room = cell.context + (self.turns(cell).room + 3) * FORWARDS
        return lambda contender: HostLane(contender, prompt, room)
