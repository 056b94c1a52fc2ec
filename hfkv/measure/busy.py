"""Processes that do nothing but keep cores busy, to be timed beside."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

# Ends with the process that started it, whatever becomes of that.
_SPIN = """
import os
print(flush=True)
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""
# Of a process that has just started, the scheduler has to learn that it wants a core all the time.
_SETTLING = 0.2  # seconds


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps that many other processes busy meanwhile, on the cores that the system gives them."""
    with contextlib.ExitStack() as ends:
        processes = []
        for _ in range(count):
            process = ends.enter_context(subprocess.Popen([sys.executable, "-c", _SPIN], stdout=subprocess.PIPE))
            ends.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        if processes:
            time.sleep(_SETTLING)
        yield
