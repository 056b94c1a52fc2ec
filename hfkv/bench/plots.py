"""A picture of a result: bars a contender, a panel a context, each bar with its figures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfkv.bench.results import OK, WRONG, Result, Row, Table
from hfkv.measure.plotting import new_figure

DPI = 144
PANEL_WIDTH, BAR_HEIGHT, FRAME_HEIGHT = 6.4, 0.34, 1.5
OURS, PEER, FLOOR = "#2a7f9e", "#b8b8b8", "#c2410c"
MEGABYTE = 1e6


def write_plot(path: Path, result: Result) -> None:
    """Draws a result as a PNG file.

    Args:
        path: the file.
        result: what to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = min(len(result.tables), 2)
    lines = -(-len(result.tables) // columns)
    bars = max(len(_drawn(table)) for table in result.tables)
    figure = new_figure(PANEL_WIDTH * columns, 0.9 + lines * (FRAME_HEIGHT + BAR_HEIGHT * bars))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, table in zip(panels, result.tables, strict=False):
        _draw(axes, result, table)
    for axes in panels[len(result.tables) :]:
        axes.set_visible(False)
    machine = result.machine
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    figure.suptitle(f"{_TITLES[result.suite]}\n{result.shape}, {result.dtype}, {where}", fontsize=11)
    figure.supxlabel(_legend(result), fontsize=8.5)
    figure.savefig(path, dpi=DPI)


_TITLES = {
    "attention": "One layer's update and attention of a decode step",
    "step": "One decode step of generate()",
    "prefill": "Prompt to first new token",
    "host": "CPU time of one decode step of a model that is too small to compute",
    "reuse": "Prompt with a known beginning to first new token",
    "memory": "Bytes of one layer's cache",
    "moe": "One call of a layer's experts",
    "mla": "Latent attention",
}


def _drawn(table: Table) -> list[Row]:
    """The rows with a bar, the slowest peer first and hfkv's fastest last."""
    rows = [row for row in table.rows if row.status == OK]
    return sorted(rows, key=lambda row: (row.is_ours, -(row.p50_ms or row.held_bytes or 0)))


def _draw(axes: Any, result: Result, table: Table) -> None:
    rows = _drawn(table)
    is_memory = result.suite == "memory"
    names = [row.contender for row in rows]
    colours = [OURS if row.is_ours else PEER for row in rows]
    values = [(row.held_bytes or 0) / MEGABYTE if is_memory else row.p50_ms or 0.0 for row in rows]
    bars = axes.barh(names, values, color=colours, height=0.68)
    if is_memory:
        values = [(row.peak_bytes or 0) / MEGABYTE for row in rows]
        bars = axes.barh(names, values, color=colours, height=0.68, alpha=0.35)
    axes.bar_label(bars, labels=[_label(row, is_memory) for row in rows], padding=4, fontsize=8.5)
    axes.set_xlim(0, 1.45 * max(values, default=1.0))
    for index, row in enumerate(rows):
        if row.floor_ms is not None:
            axes.plot([row.floor_ms] * 2, [index - 0.34, index + 0.34], color=FLOOR, linewidth=1.6)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlabel("MB" if is_memory else "median, ms", fontsize=9)
    axes.set_title(result.about(table), fontsize=10, loc="left")
    wrong = [row.contender for row in table.rows if row.status == WRONG]
    if wrong:
        text = f"wrong, not timed: {', '.join(wrong)}"
        axes.text(1, 0, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=FLOOR)


def _label(row: Row, is_memory: bool) -> str:
    if is_memory:
        held, peak = ((count or 0) / MEGABYTE for count in (row.held_bytes, row.peak_bytes))
        return f"{digits(held)} MB, {digits(peak)} in a step"
    speedup = "" if row.speedup is None else f"  {row.speedup:.2f}×"
    return f"{digits(row.p50_ms or 0.0)} ms{speedup}"


def digits(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _legend(result: Result) -> str:
    if result.suite == "memory":
        return "blue: hfkv, grey: transformers; pale: the most during a step, the cache included"
    floor = "\nred: the time a copy of what it must read takes" if result.has("floor_ms") else ""
    if result.suite == "moe":
        bases = " or ".join(dict.fromkeys(table.base for table in result.tables if table.base is not None))
        floor = "\nred: the longer of the times that a copy of the chosen experts and the products alone take"
        return f"blue: hfkv, grey: transformers; ×: times as fast as {bases}{floor}"
    return f"blue: hfkv, grey: transformers; ×: times as fast as the fastest grey one{floor}"
