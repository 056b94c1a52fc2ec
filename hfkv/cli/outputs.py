"""Files that a command is to write: refused before it starts where that cannot be."""

from __future__ import annotations

from pathlib import Path

from hfkv.cli.errors import CommandError


def check_outputs(json_path: Path | None, plot: Path | None) -> None:
    """Refuses a JSON file or a PNG picture that could not be written.

    Raises:
        CommandError: saying why.
    """
    for name, path in (("--json", json_path), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise CommandError(f"{name} {str(path)!r}: there is no folder {str(path.parent)!r}")
        if path is not None and path.is_dir():
            raise CommandError(f"{name} {str(path)!r} is a folder; name a file in it")
    if plot is None:
        return
    from hfkv.measure.plotting import check_matplotlib

    if plot.suffix.lower() != ".png":
        raise CommandError(f"--plot {str(plot)!r} must be a PNG file: give it the ending .png")
    try:
        check_matplotlib()
    except ImportError as error:
        raise CommandError(f"--plot: {error}") from error
