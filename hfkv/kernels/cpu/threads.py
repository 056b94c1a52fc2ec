"""Work in parts on a CPU: threads take one part after the other, and nothing within a part waits for another thread."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

try:
    import resource
except ImportError:  # Windows has none: there cores are taken for unshared
    resource = None  # type: ignore[assignment]

Part = TypeVar("Part")
Result = TypeVar("Result")

# Threads that take parts. Python runs in one of them at a time; where torch has more, they share them.
MOST = 4


def do_parts(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Computes ``[work(part) for part in parts]``, by as many threads as torch uses where the cores are shared.

    Torch gives every thread its share of every operation, and all wait for each other after each. Where another
    process has one of the cores, every operation waits for a time slice of the scheduler, and attention of few queries
    is dozens of operations of some microseconds. Here a thread then takes a whole part whenever it is done with one,
    and computes it alone; a part is only waited for where it has been begun. On unshared cores torch's way is the
    faster one (int8, 16k tokens: 35 against 42 ms a step of `small`; fp8 48 against 80).

    Args:
        work: function of a part; it must not depend on the thread that calls it, nor on other parts.
        parts: parts of about the same work; results are the same however many threads there are.

    Returns:
        The results in the order of the parts.

    Raises:
        BaseException: the error that `work` raised, once no thread works any more.
    """
    total = torch.get_num_threads()
    if total == 1 or not _cores.are_shared() or _has_modes() or _setters() is None:
        return [work(part) for part in parts]
    takers = max(min(len(parts), total, MOST), 1)
    of_each = 1 if total <= MOST else total // takers
    left = deque(enumerate(parts))
    results: dict[int, Result] = {}

    def take() -> None:
        with num_threads(of_each):
            while left:
                try:
                    index, part = left.popleft()
                except IndexError:  # another thread was faster
                    return
                results[index] = work(part)

    others: list[Future[None]] = []
    # Executors take nothing once the interpreter ends, which does not stop the threads that are still at work.
    with contextlib.suppress(RuntimeError):
        for _ in range(takers - 1):
            others.append(_pool(os.getpid()).submit(torch.no_grad()(take)))
    try:
        take()
    finally:
        left.clear()
        failures = [other.exception() for other in others if not other.cancel()]
    for failure in failures:
        if failure is not None:
            raise failure
    return [results[index] for index in range(len(parts))]


class Cores:
    """Tells whether others use the cores too: threads of this process then lose them in the middle of their work.

    On cores of its own a process was taken off one a few times a second, and beside a busy one 170 to 250 times.
    """

    EVERY, MANY = 0.05, 50  # seconds between two looks; involuntary context switches a second

    def __init__(self) -> None:
        self._time, self._switches, self._shared = -math.inf, 0, False

    def are_shared(self) -> bool:
        """Whether the last look has shown shared cores; a new look is taken when it is due."""
        now = time.perf_counter()
        if resource is not None and now - self._time >= self.EVERY:
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            self._shared = switches - self._switches > self.MANY * (now - self._time)
            self._time, self._switches = now, switches
        return self._shared


_cores = Cores()


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Sets how many threads torch's operations take in the calling thread, within the context.

    `torch.set_num_threads` would also set it for every other thread that has not used torch yet.

    Raises:
        RuntimeError: torch's threads cannot be set here for one thread alone.
    """
    setters = _setters()
    if setters is None:
        raise RuntimeError("the OpenMP library of this torch was not found: leave torch's threads as they are")
    of_openmp, of_mkl = setters
    before = torch.get_num_threads()  # torch sets a thread up at its first question
    of_openmp(count)
    mkl_before = of_mkl(count)
    try:
        yield
    finally:
        of_openmp(before)
        of_mkl(mkl_before)


def _has_modes() -> bool:
    """Whether torch does something other than compute, which it does in the calling thread alone."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
    )


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process: one that was forked has none of its parent's."""
    return ThreadPoolExecutor(MOST - 1, thread_name_prefix="hfkv")


@functools.cache
def _setters() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """The setters of OpenMP's and MKL's threads for the calling thread, or None without such libraries."""
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    try:
        loaded = ctypes.CDLL(str(library))
        of_openmp = loaded.omp_set_num_threads
        of_mkl = loaded.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else int
    except (OSError, AttributeError):
        return None
    seen = []

    def look() -> None:
        before = torch.get_num_threads()
        of_openmp(before + 1)
        seen.append(torch.get_num_threads() - before)

    before = torch.get_num_threads()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return (of_openmp, of_mkl) if seen == [1] and torch.get_num_threads() == before else None
