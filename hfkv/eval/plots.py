"""Pictures of what caches cost: by config, by layer, by position, and a heat map of pass keys a config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hfkv.eval.compare import CacheReport
from hfkv.measure.plotting import new_figure

DPI = 144
# Dots where there are few positions; a line alone where they would touch.
MOST_DOTS = 32


def write_plots(
    folder: Path | str,
    reports: Sequence[CacheReport],
    grids: Mapping[str, torch.Tensor] | None = None,
    lengths: Sequence[int] = (),
    depths: Sequence[float] = (),
) -> list[Path]:
    """Draw what `compare` and `pass_key_grid` measured, as PNG files.

    Args:
        folder: Where the files go; made if it is not there.
        reports: What `compare` returned.
        grids: Accuracies [depths, lengths] by config; may be None.
        lengths: Tokens of the prompts, one for each column of the grids.
        depths: Where the keys lay, 0 to 1, one for each row of the grids.

    Returns:
        The files: ``costs.png``, ``attention_similarity.png``, ``loss_by_position.png`` and, for every grid,
        ``pass_keys_CONFIG.png``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = {
        "costs": _costs(reports),
        "attention_similarity": _attention_similarity(reports),
        "loss_by_position": _loss_by_position(reports),
    }
    for kv, grid in (grids or {}).items():
        name = re.sub(r"[^A-Za-z0-9.]+", "-", kv).strip("-")
        figures[f"pass_keys_{name}"] = _pass_keys(kv, grid, lengths, depths)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def _costs(reports: Sequence[CacheReport]) -> Any:
    figure = new_figure(10.0, 1.6 + 0.4 * len(reports))
    names = [report.kv for report in reports]
    panels = {
        "change of the perplexity, %": ([report.perplexity_change_percent for report in reports], "%+.2f"),
        "KL divergence, nats a token": ([report.kl for report in reports], "%.4f"),
        "held, of the full cache": ([report.held_ratio for report in reports], "%.3f"),
    }
    for axes, (title, (values, label)) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        bars = axes.barh(names, values, color=[f"C{index}" for index in range(len(names))])
        axes.bar_label(bars, fmt=label, padding=3)
        axes.margins(x=0.45)
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    return figure


def _attention_similarity(reports: Sequence[CacheReport]) -> Any:
    figure = new_figure(8.0, 4.5)
    axes = figure.subplots()
    # The full cache is alike to itself; its colour stays its own.
    for index, report in enumerate(reports[1:], start=1):
        by_layer = report.attention_similarity_by_layer
        axes.plot(list(by_layer), list(by_layer.values()), marker="o", label=report.kv, color=f"C{index}")
    axes.axhline(1, color="C0", linewidth=0.8, label=reports[0].kv)
    axes.set_xlabel("layer")
    axes.set_ylabel("cosine with the full cache's")
    axes.set_title("attention outputs against the full cache's", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(frameon=False)
    return figure


def _loss_by_position(reports: Sequence[CacheReport]) -> Any:
    figure = new_figure(8.0, 6.0)
    losses, differences = figure.subplots(2, 1, sharex=True)
    full = reports[0].nats_by_position
    for index, report in enumerate(reports):
        nats = report.nats_by_position
        middles = [(position + 0.5) * report.chunk for position in range(len(nats))]
        style = {"marker": "o" if len(nats) <= MOST_DOTS else None, "markersize": 4, "color": f"C{index}"}
        losses.plot(middles, nats, label=report.kv, **style)
        differences.plot(middles, [own - of_full for own, of_full in zip(nats, full, strict=True)], **style)
    losses.set_ylabel("loss, nats a token")
    losses.set_title("loss by position", fontsize=10)
    losses.legend(frameon=False)
    differences.set_ylabel(f"above {reports[0].kv}'s")
    differences.set_xlabel("position in the block, tokens")
    return figure


def _pass_keys(kv: str, grid: torch.Tensor, lengths: Sequence[int], depths: Sequence[float]) -> Any:
    figure = new_figure(2.2 + 1.1 * len(lengths), 1.8 + 0.5 * len(depths))
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the key")
    axes.set_title(f"pass keys found: {kv}", fontsize=10)
    for row, column in torch.cartesian_prod(torch.arange(len(depths)), torch.arange(len(lengths))).tolist():
        share = grid[row, column].item()
        # The colour map is dark at both ends.
        colour = "black" if 0.2 < share < 0.8 else "white"
        axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes)
    return figure
