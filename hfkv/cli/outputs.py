"""Files that a command is to write: refused before it starts where that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

from hfkv.cli.errors import CommandError


def check_outputs(json_path: Path | None, plot: Path | None = None, **reads: Path | None) -> None:
    """Refuses a JSON file or a PNG picture that could not be written, or that would take another file's place.

    Args:
        json_path: the file of ``--json``.
        plot: the file of ``--plot``.
        **reads: files that the command reads, by their options.

    Raises:
        CommandError: saying why.
    """
    check_apart(**reads, json=json_path, plot=plot)
    for name, path in (("--json", json_path), ("--plot", plot)):
        if path is not None:
            _check_file(name, path)
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise CommandError(f"--plot {str(plot)!r} must be a PNG file: give it the ending .png")
        check_can_draw()


def check_apart(**paths: Path | None) -> None:
    """Refuses paths, by their options, of which two are the same.

    Raises:
        CommandError: naming both.
    """
    seen: dict[str, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        name = os.path.realpath(path)
        if name in seen:
            raise CommandError(
                f"--{seen[name]} and --{option} both name {str(path)!r}, and one would take the other's place; name two"
            )
        seen[name] = option


def check_can_draw() -> None:
    """Refuses ``--plot`` where matplotlib is not installed.

    Raises:
        CommandError: saying how to install it.
    """
    from hfkv.measure.plotting import check_matplotlib

    try:
        check_matplotlib()
    except ImportError as error:
        raise CommandError(f"--plot: {error}") from error


def _check_file(name: str, path: Path) -> None:
    try:
        if not path.parent.is_dir():
            raise CommandError(
                f"{name} {str(path)!r}: there is no folder {str(path.parent)!r}; make it, or name a file in another"
            )
        if path.is_dir():
            raise CommandError(f"{name} {str(path)!r} is a folder; name a file in it")
        is_open = os.access(path if path.exists() else path.parent, os.W_OK)
    except (OSError, ValueError) as error:  # a name too long, or one that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"{name} {str(path)!r} cannot be a file: {reason}; give it another name") from error
    if not is_open:
        raise CommandError(f"{name} {str(path)!r} may not be written; name another file, or give yourself the right to")
