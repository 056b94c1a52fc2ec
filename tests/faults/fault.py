"""`Fault`: one change that makes the library wrong."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One change of one file that makes the library wrong.

    Attributes:
        name: what is wrong then.
        file: the file, from the top of the repository.
        old: code that the file has exactly once.
        new: what takes its place.
        tests: the test files that should find it, from ``tests/``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
