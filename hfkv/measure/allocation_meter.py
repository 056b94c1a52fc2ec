"""`AllocationMeter`: the most that torch allocates on a device during some work."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile


class AllocationMeter:
    """Sees the most that is allocated at once from `start` to its end, of what was allocated in its ``with`` block.

    Attributes:
        peak: those bytes, once the block has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> AllocationMeter:
        self._ends = ExitStack()
        self._begin = 0
        if self.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            # Torch counts no bytes of a CPU; its profiler sees every block come and go.
            self._ends.enter_context(_quiet())
            self._seen = self._ends.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        return self

    def start(self) -> None:
        """What is held by now counts, and what is allocated from now on; what has been let go of does not."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._begin = time.time_ns()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.__exit__(kind, error, at)
        if error is None and self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        elif error is None:
            self.peak = self._peak_seen()

    def _peak_seen(self) -> int:
        profiler = self._seen.profiler
        assert profiler is not None
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()
            if event.start_ns() >= self._begin:
                peak = max(peak, allocated)
        return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native code writes to the terminal by itself, and no setting of it is read late enough."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
