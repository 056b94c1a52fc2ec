"""What was said on the command line."""

from __future__ import annotations

import shlex

import typer

from hfkv.cli.errors import CommandError
from hfkv.policy.units import MOST_COUNT, read_number, shortened


def command_line(context: typer.Context, *words: str) -> str:
    """The command line, from what was given on it.

    Args:
        context: typer's context of the command.
        *words: its name, such as ``"hfkv", "bench"``.
    """
    said = list(words)
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            said.append(option.opts[0] if value else option.secondary_opts[0])
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            said += [option.opts[0], str(item)] if option.opts[0].startswith("-") else [str(item)]
    return shlex.join(said)


def whole_numbers(option: str, given: str) -> tuple[int, ...]:
    """Whole numbers above 0 with commas between them.

    Raises:
        CommandError: they are something else.
    """
    words = [word.strip() for word in given.split(",")]
    numbers = tuple(int(read_number(word)) for word in words if word.isdecimal() and word.isascii())
    if len(numbers) < len(words) or min(numbers) < 1:
        raise CommandError(f"{option} takes whole numbers with commas, such as 512,1024; got {shortened(given)!r}")
    if max(numbers) > MOST_COUNT:
        raise CommandError(f"{option} takes numbers of at most {MOST_COUNT:,}, got {shortened(given)!r}")
    return numbers
