"""Timing: a clock for each kind of device, and the bandwidth of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

# Bytes of the tensor that is copied: far more than a cache of the processor holds, and as large as a GPU needs to show
# its bandwidth.
COPY_BYTES = {"cpu": 2**28, "other": 2**31}
COPIES = 10
# A GPU that waits counts its own cycles, at 2 GHz or less.
CYCLES_A_MS = 2 * 10**6


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes on a device, until all it has started there is done."""
    if device.type == "cuda":
        return _by_events(work, device)
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def queued_milliseconds(work: Callable[[], object], device: torch.device, launch_ms: float) -> float:
    """How long a GPU is busy with `work`, the launching left out: it waits until all is queued, as in a CUDA graph.

    Args:
        work: what to time. Where it waits for the device itself, launching is counted.
        device: the GPU; of others it is `milliseconds`.
        launch_ms: how long launching `work` takes; twice as long is waited for.
    """
    if device.type != "cuda":
        return milliseconds(work, device)
    return _by_events(work, device, int(2 * launch_ms * CYCLES_A_MS))


def _by_events(work: Callable[[], object], device: torch.device, cycles: int = 0) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if cycles:
        torch.cuda._sleep(cycles)
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


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, p50, p80 = values.tolist()
    return p20, p50, p80
