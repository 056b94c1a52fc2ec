"""`MemoryMonitor`: how much memory a stretch of code takes, sampled while it runs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from hfkv.measure.allocated import cache_bytes
from hfkv.measure.meters import CacheMeter, LiveCachesMeter, Meter, meters_of
from hfkv.measure.monitor_plot import write_plot
from hfkv.policy.ports import port

if TYPE_CHECKING:
    from rich.table import Table
else:
    Table = Any  # for typing.get_type_hints, without the import

logger = logging.getLogger("hfkv")

CACHES = "caches"
# Beyond so many samples every second one is left out, and from there on only every second one is kept.
MOST_SAMPLES = 20_000


@dataclass(frozen=True)
class Sample:
    """What was read at one moment.

    Attributes:
        seconds: the time since the start.
        num_bytes: bytes by the name of the line; a line that could not be read is missing.
    """

    seconds: float
    num_bytes: dict[str, int]


class MemoryMonitor:
    """Watches memory around any code, a `generate` call say, from a thread of its own.

    Its lines are ``"cpu"``, the resident set of the process; one for each accelerator, ``"cuda:0"``, what torch's
    allocator has handed out there; ``"caches"``, the `nbytes` of all hfkv caches of the process, those included that a
    patched model makes for a call (forks that share pages each count them); and one for every cache it was given.

    Between two samples it sees only what the system counts itself: the process's largest resident set (Linux) and
    torch's `max_memory_allocated`. It reads these and never resets them; where such a mark has risen during the run,
    the peak is exact.

        >>> import torch
        >>> import hfkv
        >>> with hfkv.MemoryMonitor(interval=0.01) as monitor:
        ...     numbers = torch.ones(16, 1024, 1024)  # 64 MiB
        >>> monitor.peak["cpu"] - monitor.samples[0].num_bytes["cpu"] > 50 * 2**20
        True

    Args:
        interval: seconds between two samples.
        live: show one line on stderr that is kept up to date; nothing where stderr is not a terminal.
        devices: the devices to watch, ``["cpu", "cuda:0"]`` or ``["cuda"]``; None for the CPU and all accelerators.
        cache: see `watch`.

    Attributes:
        errors: what could not be read, and how often.

    Raises:
        TypeError, ValueError: an argument is none of these, or torch does not count a device's bytes.
    """

    def __init__(
        self,
        interval: float = 0.05,
        live: bool = False,
        devices: Iterable[torch.device | str] | None = None,
        cache: Any = None,
    ) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int | float):
            raise TypeError(f"MemoryMonitor takes a number of seconds for interval, got {interval!r}")
        if not 0 < interval < float("inf"):
            raise ValueError(f"MemoryMonitor takes an interval above 0 seconds, got {interval!r}")
        if not isinstance(live, bool):
            raise TypeError(f"MemoryMonitor takes True or False for live, got {live!r}")
        if isinstance(devices, str | torch.device):
            raise TypeError(f"MemoryMonitor takes a list of devices, such as [{str(devices)!r}], got {devices!r}")
        self.interval = interval
        self.live = live
        self.errors: dict[str, int] = {}
        self._meters: list[Meter] = [*meters_of(devices), LiveCachesMeter(CACHES)]
        self._samples: list[Sample] = []
        self._stride, self._count = 1, 0
        self._begin = 0.0
        self._thread: threading.Thread | None = None
        self._line: Any = None
        self._stopping = threading.Event()
        if cache is not None:
            self.watch(cache)

    def watch(self, cache: Any, name: str = "cache") -> None:
        """Gives a cache a line of its own, before the start or during the run.

        Args:
            cache: an hfkv cache or one of transformers'; kept weakly, 0 bytes once it is gone.
            name: the line's name.

        Raises:
            TypeError: it is no cache.
            ValueError: there is a line of that name.
        """
        cache_bytes(cache)
        if any(meter.name == name for meter in self._meters):
            raise ValueError(f"this monitor has a line {name!r} already; give another name: watch(cache, name=...)")
        self._meters = [*self._meters, CacheMeter(name, [cache])]

    def start(self) -> None:
        """Takes the first sample and starts the thread.

        Raises:
            RuntimeError: it was started before.
        """
        if self._samples:
            raise RuntimeError("this MemoryMonitor was started before: one records one run; make another")
        self._begin = time.perf_counter()
        self._sample()
        if self.live:
            self._line = port("monitor_line")()
        self._thread = threading.Thread(target=self._run, name="hfkv-memory-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, takes the last sample, and logs what could not be read.

        Raises:
            RuntimeError: it is not running.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            was = "has been stopped already" if self._samples else "was never started"
            raise RuntimeError(f"this MemoryMonitor {was}")
        self._stopping.set()
        thread.join()
        self._sample()
        self._show()
        if self._line is not None:
            self._guarded(self._line.stop, "could not leave its line")
        for what, count in self.errors.items():
            logger.warning("MemoryMonitor: %s (%d times)", what, count)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:  # the body may have stopped it
            self.stop()

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What was read so far, from the start on; in a long run not every sample is kept."""
        return tuple(self._samples)

    @property
    def peak(self) -> dict[str, int]:
        """The most bytes so far, by the name of the line.

        Raises:
            RuntimeError: it was never started.
        """
        self._check_started()
        return self._peaks()

    def _check_started(self) -> None:
        if not self._samples:
            raise RuntimeError("this MemoryMonitor has no samples yet: start it first")

    def _peaks(self) -> dict[str, int]:
        return {meter.name: meter.peak for meter in self._meters}

    @property
    def exact(self) -> frozenset[str]:
        """The lines whose peak the system has counted; for the others it is the largest sample."""
        return frozenset(meter.name for meter in self._meters if meter.is_exact)

    @property
    def caches(self) -> frozenset[str]:
        """The lines that are caches; the others are devices."""
        return frozenset(meter.name for meter in self._meters if isinstance(meter, CacheMeter))

    def summary(self) -> Table:
        """A rich table: a line for what it watched, at the start, at most and at the end."""
        return port("monitor_table")(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the samples as a PNG file.

        Raises:
            ImportError: matplotlib is not installed.
            RuntimeError: there is nothing to draw yet.
            ValueError: the file is no PNG file, or its folder is missing.
        """
        self._check_started()
        write_plot(path, self)

    def __rich__(self) -> Table:
        return self.summary()

    def __repr__(self) -> str:
        return f"MemoryMonitor(interval={self.interval}, samples={len(self._samples)}, peak={self._peaks()})"

    def _run(self) -> None:
        while not self._stopping.wait(self.interval):
            self._sample()
            self._show()

    def _sample(self) -> None:
        num_bytes = {}
        for meter in self._meters:
            read = self._guarded(meter.read, f"could not read {meter.name!r}")
            if read is not None:
                num_bytes[meter.name] = read
        sample = Sample(time.perf_counter() - self._begin, num_bytes)
        if self._count % self._stride == 0 or self._stopping.is_set():
            self._samples.append(sample)
        self._count += 1
        if len(self._samples) > MOST_SAMPLES:
            self._samples, self._stride = self._samples[::2], 2 * self._stride

    def _show(self) -> None:
        line = self._line
        if line is not None:
            self._guarded(lambda: line.show(self), "could not show its line")

    def _guarded(self, do: Callable[[], Any], failed: str) -> Any:
        """What `do` returns, or None and a note: a monitor must not end what it watches."""
        try:
            return do()
        except Exception as error:
            what = f"{failed}: {type(error).__name__}: {error}"
            self.errors[what] = self.errors.get(what, 0) + 1
            return None
