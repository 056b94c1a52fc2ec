"""Consoles of the commands: one for what is shown, one for bars and errors."""

from __future__ import annotations

from rich.console import Console

# Narrower terminals break the lines of such a one themselves; of no width at all is what has none to tell.
LEAST_WIDTH, USUAL_WIDTH = 40, 80


def new_console(stderr: bool = False) -> Console:
    """A console of the terminal's width, or of `COLUMNS`, and of `LEAST_WIDTH` at least.

    Args:
        stderr: whether it writes to stderr.
    """
    console = Console(stderr=stderr, highlight=False)
    width = console.width
    if width < LEAST_WIDTH:
        console.width = LEAST_WIDTH if width > 0 else USUAL_WIDTH
    return console
