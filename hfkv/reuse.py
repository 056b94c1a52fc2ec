"""`Reuse`: share the prompt prefixes of one call with the next, within a budget."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("KiB", 2**10), ("kB", 10**3), ("B", 1))
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([a-z]+)$")


@dataclass(frozen=True)
class Reuse:
    """Keep the pages of prompts and replies, and give them to later calls of the patched model that begin alike.

    Args:
        budget: the most bytes to keep besides the caches of running calls: a number, or ``"512MiB"``, ``"2GiB"``. The
            pages used least recently go first.
        salt: calls share only with calls of the same salt: a tenant's name, say.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.
    """

    budget: int | str = "2GiB"
    salt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.salt, str):
            raise TypeError(f"Reuse.salt must be a str, got {self.salt!r}")
        object.__setattr__(self, "budget", read_bytes("Reuse.budget", self.budget))

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        assert isinstance(self.budget, int)
        return self.budget

    def __str__(self) -> str:
        unit, size = next((unit, size) for unit, size in _UNITS if self.budget_bytes % size == 0)
        return f"{self.budget_bytes // size}{unit}"


def read_bytes(name: str, given: int | str) -> int:
    """A number of bytes, at least 1.

    Args:
        name: of the field, for the error.
        given: a number, or one with a unit: ``"512MiB"``, ``"2GB"``.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise TypeError(f'{name} must be a number of bytes or a str such as "512MiB", got {given!r}')
    if isinstance(given, str):
        match = _SIZE.match(given.strip().lower())
        sizes = {unit.lower(): size for unit, size in _UNITS}
        if match is None or match[2] not in sizes:
            raise ValueError(
                f'{name} takes a size such as "512MiB" or "2GB" (B, kB, MB, GB, KiB, MiB, GiB), got {given!r}'
            )
        given = int(float(match[1]) * sizes[match[2]])
    if given < 1:
        raise ValueError(f"{name} must be at least 1 byte, got {given}")
    return given
