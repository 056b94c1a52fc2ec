"""Tables on a terminal, all of one kind, and any of them as plain text."""

from __future__ import annotations

import io

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

TEXT_WIDTH = 100


def new_table(*left: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines between its columns.

    Args:
        left: headers of the first columns, which are flush left.
        right: headers of the others, which are flush right.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def plain_text(shown: RenderableType, width: int = TEXT_WIDTH) -> str:
    """What rich would print, as text of `width` columns without colours."""
    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None, force_terminal=False, highlight=False)
    console.print(shown)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()).strip("\n")
