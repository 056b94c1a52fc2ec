"""The picture of a `MemoryMonitor`: bytes over seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hfkv.measure.plotting import new_figure
from hfkv.policy.units import about_bytes

DPI, WIDTH, PANEL_HEIGHT = 144, 8.0, 2.7
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def write_plot(path: str | os.PathLike[str], monitor: Any) -> None:
    """Draws what a `MemoryMonitor` has sampled; see `MemoryMonitor.plot`."""
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


def _points(samples: tuple[Any, ...], name: str) -> tuple[list[float], list[int]]:
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
