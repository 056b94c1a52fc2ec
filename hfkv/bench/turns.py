"""`take_turns`: lanes timed side by side, so that whatever disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hfkv.bench.lane import Lane
from hfkv.measure.busy import busy_processes

# Fewer turns say nothing of the spread; more only take time.
LEAST_TURNS, MOST_TURNS = 5, 200
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Turns:
    """How often the contenders of one context take turns: `count` times, or as often as fit in `seconds`.

    A static cache has room for the most, and attends over all of it. Meanwhile `busy` processes keep cores busy.
    """

    count: int | None
    seconds: float
    least: int = LEAST_TURNS
    most: int = MOST_TURNS
    busy: int = 0

    @property
    def room(self) -> int:
        """Turns a cache needs room for."""
        return self.most if self.count is None else self.count

    def share(self, turns: int, seconds: float) -> float:
        """How much is done, 0 to 1, after so many turns and seconds."""
        if self.count is not None:
            return turns / self.count
        if turns >= self.most:
            return 1.0
        return min(turns / self.least, seconds / self.seconds, 1.0)


def take_turns(lanes: Sequence[Lane], turns: Turns, keep_open: bool, on_share: Progress) -> None:
    """Times lanes one after the other, again and again, until each has its times or has run out of memory.

    Where not the caches of all fit in memory at once (`keep_open`), each is filled anew for every turn.
    """
    start, done, waiting = time.perf_counter(), 0, list(lanes)
    with busy_processes(turns.busy):
        while waiting and turns.share(done, time.perf_counter() - start) < 1:
            for lane in tuple(waiting):
                on_share(lane.name, turns.share(done, time.perf_counter() - start))
                try:
                    if not keep_open:
                        lane.open()
                    if not keep_open or not lane.times:
                        lane.warm_up()
                    lane.times += lane.turn()
                except OUT_OF_MEMORY as error:
                    lane.failure = out_of_memory(error)
                    waiting.remove(lane)
                if not keep_open or lane.failure is not None:
                    lane.close()
                    free_memory()
            done += 1


def out_of_memory(error: BaseException) -> str:
    """The reason a contender is left out."""
    return f"out of memory: {(str(error).strip().splitlines() or ['no message'])[0]}"


def free_memory() -> None:
    """Gives back what a closed cache held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
