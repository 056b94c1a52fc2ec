"""A picture of a plan: a bar a cache, of weights, keys and values and the rest, against the limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfkv.measure.plotting import new_figure

if TYPE_CHECKING:
    from hfkv.planning.plan import MemoryPlan

DPI = 144
WIDTH, BAR_HEIGHT, FRAME_HEIGHT = 7.6, 0.38, 1.9
WEIGHTS, KV, REST, LIMIT = "#b8b8b8", "#2a7f9e", "#d9cfae", "#c2410c"
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def write_plot(path: Path, plan: MemoryPlan) -> None:
    """Draws a plan as a PNG file.

    Args:
        path: the file.
        plan: what to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(WIDTH, FRAME_HEIGHT + BAR_HEIGHT * len(plan.caches))
    axes = figure.subplots()
    names = [cache.kv for cache in plan.caches]
    weights = next(each for each in plan.weights if each.name == plan.chosen)
    parts = (
        (f"{weights.name} weights", WEIGHTS, [weights.nbytes] * len(names)),
        ("keys and values on the device", KV, [cache.device_bytes for cache in plan.caches]),
        ("activations and the device's own", REST, [plan.activation_bytes + plan.overhead_bytes] * len(names)),
    )
    most = max(plan.memory_bytes, *(cache.total_bytes for cache in plan.caches))
    unit, unit_size = next((each for each in UNITS if most >= each[1]), UNITS[-1])
    left = [0.0] * len(names)
    for label, colour, sizes in parts:
        widths = [size / unit_size for size in sizes]
        bars = axes.barh(names, widths, left=left, color=colour, height=0.68, label=label)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.bar_label(bars, labels=[f"{total:,.1f} {unit}" for total in left], padding=4, fontsize=8.5)
    limit = plan.memory_bytes / unit_size
    axes.axvline(limit, color=LIMIT, linewidth=1.6, label=f"{limit:,.1f} {unit}, {plan.memory_source}")
    axes.set_xlim(0, 1.18 * max(*left, limit))
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_xlabel(unit, fontsize=9)
    axes.set_title(f"{plan.model}, {plan.batch} × {plan.context:,} tokens", fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=DPI)
