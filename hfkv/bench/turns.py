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


def take_turns(
    lanes: Sequence[Lane], turns: Turns, keep_open: bool, on_share: Progress
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times lanes one after the other, again and again: by lane the times in ms, and why it ran out of memory.

    Where not the caches of all fit in memory at once (`keep_open`), each is filled anew for every turn.
    """
    times: dict[str, list[float]] = {lane.name: [] for lane in lanes}
    failed: dict[str, str] = {}
    cold = {lane.name for lane in lanes}
    start, done = time.perf_counter(), 0
    with busy_processes(turns.busy):
        while len(failed) < len(lanes) and turns.share(done, time.perf_counter() - start) < 1:
            for lane in lanes:
                if lane.name in failed:
                    continue
                on_share(lane.name, turns.share(done, time.perf_counter() - start))
                try:
                    if not keep_open:
                        lane.open()
                    if not keep_open or lane.name in cold:
                        lane.warm_up()
                        cold.discard(lane.name)
                    times[lane.name] += lane.turn()
                except (MemoryError, torch.OutOfMemoryError) as error:
                    failed[lane.name] = out_of_memory(error)
                if not keep_open or lane.name in failed:
                    lane.close()
                    free_memory()
            done += 1
    return times, failed


def out_of_memory(error: BaseException) -> str:
    """The reason a contender is left out."""
    return f"out of memory: {(str(error).strip().splitlines() or ['no message'])[0]}"


def free_memory() -> None:
    """Gives back what a closed cache held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
