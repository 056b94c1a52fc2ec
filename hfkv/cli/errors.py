"""Mistakes of the user's, told in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.text import Text

from hfkv.cli.consoles import new_console
from hfkv.policy.errors import RequestError

EXIT_CODE = 2


class CommandError(Exception):
    """What was given, what is wrong with it and the remedy, in one line."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turns refusals, names that no file can have and a full disk into one red line on stderr, exit code 2."""
    try:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise CommandError(f"no file can be called {str(error.filename)!r}: {error.strerror}") from error
            if error.errno != errno.ENOSPC:
                raise
            raise CommandError(f"could not write the output: {error.strerror}") from error
    except (CommandError, RequestError) as error:
        line = " ".join(str(error).split())
        new_console(stderr=True).print(Text(f"error: {line}", style="red"), soft_wrap=True)
        raise typer.Exit(EXIT_CODE) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
