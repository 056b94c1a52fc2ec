"""The suite ``memory``: bytes of one layer's cache after a context, and the most that one decode step allocates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from hfkv.bench.attention import AttentionLane


def peak_of_step(lane: AttentionLane, device: torch.device, check: Callable[[], None]) -> int:
    """Opens a lane, runs a step and returns the most bytes that were allocated during it, its cache included.

    Args:
        lane: a contender's cache; it is left open.
        device: where it is.
        check: called once it is open, before the steps.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        lane.open()
        check()
        lane.step()
        torch.cuda.reset_peak_memory_stats(device)
        lane.step()
        return torch.cuda.max_memory_allocated(device) - before
    # Torch counts no bytes of a CPU; its profiler sees every block come and go, from the filling on.
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        lane.open()
        check()
        lane.step()
        begin = time.time_ns()
        lane.step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, allocated)
    return peak


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
