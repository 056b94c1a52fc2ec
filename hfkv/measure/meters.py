"""`Meter`: bytes that can be read again and again, and the most there have been."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from hfkv.measure.allocated import cache_bytes, live_caches

STATUS = Path("/proc/self/status")
# A cache that another thread is changing may be in between two states; a moment later it is not.
ATTEMPTS = 5


class Meter(ABC):
    """Reads one number of bytes, from any thread.

    Attributes:
        name: the name of what it measures.
        peak: the most that `read` has returned or the system has counted since the first `read`.
        is_exact: whether `peak` is the system's own count, and not only the largest of the samples.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.peak = 0
        self.is_exact = False
        self._mark_before: int | None = None
        self._is_begun = False

    def read(self) -> int:
        """The bytes now."""
        now, mark = self._now(), self._mark()
        if not self._is_begun:
            self._is_begun, self._mark_before = True, mark
        self.peak = max(self.peak, now)
        if mark is not None and self._mark_before is not None:
            if mark < self._mark_before:
                # It has been reset since: it says nothing of what was before.
                self._mark_before, self.is_exact = None, False
            elif mark > self._mark_before:
                # The system's mark has risen since the beginning: that was the most there has been since.
                self.peak, self.is_exact = max(self.peak, mark), True
        return now

    @abstractmethod
    def _now(self) -> int: ...

    def _mark(self) -> int | None:
        """The most there has ever been, as the system counts it; None where it does not."""
        return None


class ProcessMeter(Meter):
    """The resident set of this process: ``"cpu"``."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self._process = psutil.Process()

    def _now(self) -> int:
        return self._process.memory_info().rss

    def _mark(self) -> int | None:
        try:
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return None
        return int(line.split()[1]) * 1024


class DeviceMeter(Meter):
    """The bytes that torch's allocator has handed out on one accelerator: ``"cuda:0"``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(str(device))
        self._device = device
        self._module = torch.get_device_module(device)

    def _now(self) -> int:
        return self._module.memory_allocated(self._device)

    def _mark(self) -> int | None:
        return self._module.max_memory_allocated(self._device)


class CacheMeter(Meter):
    """The bytes allocated by some caches.

    Args:
        name: a name for the caches.
        caches: the caches, held weakly: one that is gone takes no bytes.
    """

    def __init__(self, name: str, caches: Iterable[Any]) -> None:
        super().__init__(name)
        self._caches = [weakref.ref(cache) for cache in caches]

    def _found(self) -> list[Any]:
        return [cache for reference in self._caches if (cache := reference()) is not None]

    def _now(self) -> int:
        for _ in range(ATTEMPTS - 1):
            try:
                return sum(map(cache_bytes, self._found()))
            except Exception:
                continue
        return sum(map(cache_bytes, self._found()))


class LiveCachesMeter(CacheMeter):
    """The bytes allocated by all hfkv caches of this process."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ())

    def _found(self) -> list[Any]:
        return [cache for cache in live_caches() if "layers" in vars(cache)]


def meters_of(devices: Iterable[torch.device | str] | None) -> list[Meter]:
    """One meter for each device.

    Args:
        devices: None for the CPU and every accelerator that torch counts bytes of.

    Raises:
        ValueError: torch counts no bytes of one of them, or it is not there.
    """
    counted = _counted()
    if devices is None:
        return [ProcessMeter(), *map(DeviceMeter, counted)]
    meters: dict[str, Meter] = {}
    for given in devices:
        try:
            device = torch.device(given)
        except (RuntimeError, TypeError) as error:
            allowed = ", ".join(("cpu", *dict.fromkeys(one.type for one in counted), *map(str, counted)))
            raise ValueError(f"MemoryMonitor knows no device {given!r}; allowed here: {allowed}") from error
        if device.type == "cpu":
            meters["cpu"] = ProcessMeter()
            continue
        chosen = [one for one in counted if one.type == device.type and device.index in (None, one.index)]
        if not chosen:
            raise ValueError(
                f"MemoryMonitor cannot measure {str(device)!r}; here are: {', '.join(('cpu', *map(str, counted)))}"
            )
        meters |= {str(one): DeviceMeter(one) for one in chosen}
    return list(meters.values())


def _counted() -> list[torch.device]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if kind is None or not hasattr(torch.get_device_module(kind), "max_memory_allocated"):
        return []
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
