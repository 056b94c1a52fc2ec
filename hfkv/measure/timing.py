"""Timing: a clock for each kind of device, the bandwidth of a copy, and contenders that take turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hfkv.measure.busy import busy_processes

# Bytes of the tensor that is copied: far more than a cache of the processor holds, and as large as a GPU needs to show
# its bandwidth.
COPY_BYTES = {"cpu": 2**28, "other": 2**31}
COPIES = 10
# A GPU that waits counts its own cycles, at 2 GHz or less.
CYCLES_A_MS = 2 * 10**6
# Fewer turns say nothing of the spread; more only take time.
LEAST_TURNS, MOST_TURNS = 5, 200


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes on a device, until all it has started there is done."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def queued_milliseconds(work: Callable[[], object], device: torch.device, launch_ms: float) -> float:
    """How long a GPU is busy with `work`, the launching left out: it waits until all is queued, as in a CUDA graph.

    Args:
        work: what to time. Where it waits for the device itself, launching is counted.
        device: the GPU.
        launch_ms: how long launching `work` takes; twice as long is waited for.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(2 * launch_ms * CYCLES_A_MS))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the fastest of several large copies on a device."""
    num_bytes = COPY_BYTES["cpu" if device.type == "cpu" else "other"]
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(COPIES))
    return 2 * num_bytes / (1e-3 * best)


def bus_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of the fastest of several large copies from pinned host memory; None without a GPU."""
    if device.type != "cuda":
        return None
    num_bytes = COPY_BYTES["cpu"]
    source = torch.ones(num_bytes // 4, dtype=torch.float32, pin_memory=True)
    target = torch.empty(source.shape, dtype=source.dtype, device=device)
    best = min(milliseconds(lambda: target.copy_(source, non_blocking=True), device) for _ in range(COPIES))
    return num_bytes / (1e-3 * best)


class Lane(Protocol):
    """One contender on its way through a suite."""

    @property
    def name(self) -> str: ...
    def open(self) -> None:
        """Makes the cache and fills it."""

    def warm_up(self) -> None:
        """Does what only the first turns do: compiles, allocates."""

    def turn(self) -> list[float]:
        """Times one or a few steps, in ms each."""

    def close(self) -> None:
        """Lets go of the cache."""


@dataclass(frozen=True)
class Turns:
    """How often the contenders of one context take turns.

    Attributes:
        count: how often; None for as often as fit in `seconds`.
        seconds: how long they take turns, where `count` is None.
        busy: how many other processes keep cores busy meanwhile.
        least, most: turns where `seconds` decide. A static cache has room for the most, and attends over all of it.
    """

    count: int | None
    seconds: float
    least: int = LEAST_TURNS
    most: int = MOST_TURNS
    busy: int = 0

    @property
    def room(self) -> int:
        """The turns that a cache needs room for."""
        return self.most if self.count is None else self.count

    def share(self, turns: int, seconds: float) -> float:
        """How much is done, 0 to 1, after so many turns and seconds."""
        if self.count is not None:
            return turns / self.count
        if turns >= self.most:
            return 1.0
        return min(turns / self.least, seconds / self.seconds, 1.0)


def take_turns(
    lanes: Sequence[Lane],
    turns: Turns,
    keep_open: bool,
    on_share: Callable[[str, float], None],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times lanes one after the other, again and again, so that whatever disturbs the machine disturbs all alike.

    Args:
        lanes: the contenders; already open where `keep_open`.
        turns: how often.
        keep_open: whether the caches of all fit in memory at once; else each is filled anew for every turn.
        on_share: called with the lane that runs next and how much is done, 0 to 1.

    Returns:
        The times in ms by lane, and why a lane ran out of memory by lane.
    """
    times: dict[str, list[float]] = {lane.name: [] for lane in lanes}
    failed: dict[str, str] = {}
    cold = {lane.name for lane in lanes}
    start, done = time.perf_counter(), 0
    with busy_processes(turns.busy):
        while turns.share(done, time.perf_counter() - start) < 1 and len(failed) < len(lanes):
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


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, p50, p80 = values.tolist()
    return p20, p50, p80
