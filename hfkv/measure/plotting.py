"""A matplotlib figure that pictures are drawn on."""

from __future__ import annotations

from typing import Any


def check_matplotlib() -> None:
    """Refuses to go on without matplotlib.

    Raises:
        ImportError: it is not installed.
    """
    new_figure(1.0, 1.0)


def new_figure(width: float, height: float) -> Any:
    """A figure of that size in inches, apart from pyplot and whatever screen it would draw on.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'pictures need matplotlib ({error}): pip install "hfkv[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")
