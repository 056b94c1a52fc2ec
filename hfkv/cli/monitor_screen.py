"""What a `MemoryMonitor` shows: one line while it runs, a table afterwards."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hfkv.cli.tables import new_table
from hfkv.measure.monitor import MemoryMonitor
from hfkv.policy.units import about_bytes

# Of the live line.
LEAST_SECONDS = 0.1
# One terminal has one live line: that of the monitor that came first.
_showing = threading.Lock()


class StderrConsole(Console):
    """A console of stderr whose end is an error like any other: rich's would end the program."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError."""
        raise BrokenPipeError("nobody reads the console any more")


class LiveLine:
    """One line of a terminal that is kept up to date; to be stopped."""

    def __init__(self, console: Console) -> None:
        # What is printed meanwhile goes above the line; what does not go to the terminal is left alone.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
        self._shown = float("-inf")
        self._live.start()

    def show(self, monitor: MemoryMonitor) -> None:
        """Brings the line up to date, not too often."""
        now = time.monotonic()
        if not monitor.is_running or now - self._shown >= LEAST_SECONDS:
            self._shown = now
            self._live.update(_line(monitor), refresh=True)

    def stop(self) -> None:
        """Leaves the line where it is."""
        try:
            self._live.stop()
        finally:
            _showing.release()


def live_line() -> LiveLine | None:
    """A live line on stderr; None where that is no terminal, or another monitor's line is there."""
    console = new_console()
    if not console.is_terminal or not _showing.acquire(blocking=False):
        return None
    try:
        return LiveLine(console)
    except BaseException:
        _showing.release()
        raise


def new_console() -> Console:
    """A console of stderr."""
    return StderrConsole(stderr=True)


def _line(monitor: MemoryMonitor) -> Text:
    last, peak = monitor.samples[-1], monitor.peak
    text = Text(f"{last.seconds:,.1f} s", "dim", no_wrap=True, overflow="ellipsis")
    for name, size in last.num_bytes.items():
        text.append(f"  {name} ", "cyan")
        text.append(about_bytes(size), "bold")
        text.append(f" (peak {about_bytes(peak[name])})", "dim")
    return text


def summary(monitor: MemoryMonitor) -> Table:
    """See `MemoryMonitor.summary`."""
    table = new_table("memory", right=("at first", "peak", "rise", "at last"))
    table.add_column("peak is", no_wrap=True)
    for name, peak in monitor.peak.items():
        sizes = [sample.num_bytes[name] for sample in monitor.samples if name in sample.num_bytes]
        if not sizes:
            table.add_row(name, "-", "-", "-", "-", "not read")
            continue
        shown = (sizes[0], peak, peak - sizes[0], sizes[-1])
        table.add_row(name, *map(about_bytes, shown), "exact" if name in monitor.exact else "of samples")
    return table
