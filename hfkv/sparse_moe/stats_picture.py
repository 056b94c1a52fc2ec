"""A picture of the load of experts: layers by experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfkv.measure.plotting import new_figure

DPI = 144
# Numbers in the cells where they fit.
MOST_NUMBERS = 16


def draw_loads(layers: Sequence[Any], path: Path) -> Path:
    """Draws the load of every expert of every layer, in multiples of the mean: 1 is balance.

    Args:
        layers: a `LayerRouting` for each row.
        path: the PNG file.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: there are no layers.
    """
    if not layers:
        raise RuntimeError("no expert has run, so there is nothing to draw: call the model inside the context manager")
    most = max(layer.num_experts for layer in layers)
    # Layers with fewer experts end early.
    blank = float("nan")
    rows = [[share * layer.num_experts for share in layer.load] for layer in layers]
    grid = [row + [blank] * (most - len(row)) for row in rows]
    figure = new_figure(3.0 + 0.5 * min(most, 24), 1.6 + 0.32 * len(layers))
    axes = figure.subplots()
    top = max(2.0, max(max(row) for row in rows))
    image = axes.imshow(grid, cmap="viridis", vmin=0.0, vmax=top, aspect="auto")
    names = [f"{layer.name} (collapsed)" if layer.collapsed else layer.name for layer in layers]
    axes.set_yticks(range(len(layers)), names)
    axes.set_xlabel("expert")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("load of each expert, of the mean", fontsize=10)
    if most <= MOST_NUMBERS:
        for row, values in enumerate(rows):
            for column, value in enumerate(values):
                # The colour map is dark at its lower end.
                colour = "black" if value > 0.6 * top else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
