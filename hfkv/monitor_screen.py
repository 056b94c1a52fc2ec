"""What a `MemoryMonitor` shows: one line while it runs, a table and a picture afterwards."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hfkv.figure import new_figure
from hfkv.sizes import about_bytes

if TYPE_CHECKING:
    from hfkv.monitor import MemoryMonitor, Sample

# Of the live line.
LEAST_SECONDS = 0.1
DPI, WIDTH, PANEL_HEIGHT = 144, 8.0, 2.7
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))

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
    """Of stderr."""
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
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("memory", no_wrap=True)
    for header in ("at first", "peak", "rise", "at last"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("peak is", no_wrap=True)
    for name, peak in monitor.peak.items():
        sizes = [sample.num_bytes[name] for sample in monitor.samples if name in sample.num_bytes]
        if not sizes:
            table.add_row(name, "-", "-", "-", "-", "not read")
            continue
        shown = (sizes[0], peak, peak - sizes[0], sizes[-1])
        table.add_row(name, *map(about_bytes, shown), "exact" if name in monitor.exact else "of samples")
    return table


def write_plot(path: str | os.PathLike[str], monitor: MemoryMonitor) -> None:
    """See `MemoryMonitor.plot`."""
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise ValueError(f"plot draws a PNG file, got {str(file)!r}: give it the ending .png")
    if file.is_dir():
        raise ValueError(f"plot writes a file, and {str(file)!r} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise ValueError(f"plot cannot write {str(file)!r}: there is no folder {str(file.parent)!r}")
    samples, peak = monitor.samples, monitor.peak
    caches = [name for name in peak if name in monitor.caches]
    panels = [("devices", [name for name in peak if name not in caches]), ("caches", caches)]
    panels = [(title, names) for title, names in panels if any(_points(samples, name)[1] for name in names)]
    figure = new_figure(WIDTH, 0.6 + PANEL_HEIGHT * len(panels))
    drawn = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flatten()
    for axes, (title, names) in zip(drawn, panels, strict=True):
        _draw(axes, title, {name: _points(samples, name) for name in names}, peak)
    drawn[-1].set_xlabel("seconds", fontsize=9)
    figure.savefig(file, dpi=DPI, format="png")


def _points(samples: tuple[Sample, ...], name: str) -> tuple[list[float], list[int]]:
    """Seconds and bytes."""
    read = [(sample.seconds, sample.num_bytes[name]) for sample in samples if name in sample.num_bytes]
    return [second for second, _ in read], [size for _, size in read]


def _draw(axes: Any, title: str, lines: dict[str, tuple[list[float], list[int]]], peak: dict[str, int]) -> None:
    most = max(peak[name] for name in lines)
    unit, unit_size = next(((name, size) for name, size in UNITS if most >= size), UNITS[-1])
    for name, (seconds, sizes) in lines.items():
        label = f"{name}, peak {about_bytes(peak[name])}"
        scaled = [size / unit_size for size in sizes]
        (line,) = axes.plot(seconds, scaled, linewidth=1.5, label=label, drawstyle="steps-post")
        axes.axhline(peak[name] / unit_size, color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.08 * max(most / unit_size, 1))
    axes.set_ylabel(unit, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(lines))
