"""The progress bar of a search for codecs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import TaskProgressColumn

from hfkv.cli.consoles import new_console
from hfkv.cli.loading import progress_on


@contextmanager
def search_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Draws a bar on stderr that is gone afterwards; nothing where that is no terminal.

    Yields:
        A function of what is running, how many tokens it has just read and how many will be read in all.
    """
    with progress_on(new_console(stderr=True), TaskProgressColumn()) as progress:
        task = progress.add_task("finding codecs", total=None)
        yield lambda what, count, total: progress.update(task, advance=count, total=total, description=what)
