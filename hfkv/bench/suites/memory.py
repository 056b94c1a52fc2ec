"""The suite ``memory``: bytes of one layer's cache after a context, and the most that one decode step allocates."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell
from hfkv.bench.suites.attention import AttentionLane, AttentionSuite
from hfkv.bench.turns import Turns


class MemoryLane(AttentionLane):
    """One contender's cache, which is filled, checked and stepped under a meter, and takes no turns."""

    def prepare(self) -> dict[str, Any]:
        """Makes it ready and checks it, and sees the most that is allocated during a step."""
        device = self.tokens.query.device
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            figures = super().prepare()
            self.step()
            torch.cuda.reset_peak_memory_stats(device)
            self.step()
            return {**figures, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}
        # Torch counts no bytes of a CPU; its profiler sees every block come and go, from the filling on.
        with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            figures = super().prepare()
            self.step()
            begin = time.time_ns()
            self.step()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()
            if event.start_ns() >= begin:
                peak = max(peak, allocated)
        return {**figures, "peak_bytes": peak}


class MemorySuite(AttentionSuite):
    """The suite."""

    lane = MemoryLane

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # Compiled or not, it allocates the same cache.
        for index, one in enumerate(self.contenders):
            if one.is_compiled:
                self.contenders[index] = replace(one, is_compiled=False, reason=None)

    def num_layers(self, context: int) -> int:
        return 1

    def turns(self, cell: Cell) -> Turns:
        """None at all, and no room for any."""
        return Turns(0, self.setting.seconds)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's native code writes to the terminal by itself, and no setting of it is read late enough."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
