"""Tables on a terminal, all of one kind, and any of them as plain text."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

TEXT_WIDTH = 100
# What rich puts between two columns, and at the edges together.
SPACE = 2
# The least characters in which names of rows are folded.
NARROWEST = 10
# The cells of every column by its header, which may have two lines.
Columns = dict[str, list[Text]]


def new_table(*left: str, right: Iterable[str] = (), folded: Iterable[str] = ()) -> Table:
    """A table without lines between its columns.

    Args:
        left: headers of the first columns, which are flush left.
        folded: headers of the next, which are too, and give way to the others.
        right: headers of the others, which are flush right.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in folded:
        table.add_column(header, overflow="fold")
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def table_of(header: str, names: Sequence[Text], columns: Columns, ends: Collection[int] = ()) -> Table:
    """A table of columns behind a first one of names.

    Args:
        header: over the names.
        names: a row each.
        columns: lists of as many cells.
        ends: rows that end a section.
    """
    # Names give way, and fold: numbers are never cut.
    table = new_table(right=columns, folded=(header,))
    for index, name in enumerate(names):
        table.add_row(name, *(cells[index] for cells in columns.values()), end_section=index in ends)
    return table


def room(columns: Columns, width: int) -> int:
    """What columns leave for the names before them, of so many characters in all."""
    texts = [
        [line for text in (header, *(cell.plain for cell in cells)) for line in text.split("\n")]
        for header, cells in columns.items()
    ]
    return width - SPACE - sum(max(map(len, column)) + SPACE for column in texts)


def drop_to_fit(columns: Columns, width: int, dispensable: Iterable[str], needed: int) -> list[str]:
    """Takes columns out until what is left leaves the names the room they need, or that in which they still fold.

    Args:
        columns: they are changed; the first stays.
        width: characters in all.
        dispensable: what headers of columns that may go begin with, the first to go first. Where names would have less
            than `NARROWEST`, others go too, the last first.
        needed: characters of the names.

    Returns:
        Those of `dispensable` that are gone, and the headers of the others.
    """
    dropped = []
    for start in dispensable:
        header = next((header for header in columns if header.startswith(start)), None)
        if header is not None and room(columns, width) < needed:
            del columns[header]
            dropped.append(start)
    for header in [*columns][:0:-1]:
        if room(columns, width) < min(needed, NARROWEST):
            del columns[header]
            dropped.append(header)
    return dropped


def one_line(header: str) -> str:
    """A header of two lines in one."""
    return " ".join(header.replace("-\n", "").split())


def wider(dropped: Iterable[str]) -> dict[str, str]:
    """The note of columns that are gone."""
    names = ", ".join(map(one_line, dropped))
    return {"more": f"wider terminals show: {names}"} if names else {}


def pieces(kv: str) -> list[str]:
    """A config's words, each but the first with its plus."""
    first, *others = kv.split("+")
    return [first, *(f"+{word}" for word in others)]


def wrap(kv: str, width: int) -> str:
    """A config in lines of up to `width` characters, cut before a plus."""
    lines = [""]
    for piece in pieces(kv):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def unit_of(size: float, units: Sequence[tuple[float, str]], least: float) -> tuple[float, str]:
    """The first unit of which a size is so many at least; the last one of smaller sizes."""
    return next((unit for unit in units if size >= least * unit[0]), units[-1])


def notes_grid(notes: Mapping[str, str | Text]) -> Table:
    """What words of a table mean, below it."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    for name, note in notes.items():
        grid.add_row(Text(name, "cyan"), note if isinstance(note, Text) else Text(note, "dim"))
    return grid


def plain_text(shown: RenderableType, width: int = TEXT_WIDTH) -> str:
    """What rich would print, as text of `width` columns without colours."""
    written = io.StringIO()
    console = Console(file=written, width=width, color_system=None, force_terminal=False, highlight=False)
    console.print(shown)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()).strip("\n")
