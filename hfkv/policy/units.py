"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("KiB", 2**10), ("kB", 10**3), ("B", 1))
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([a-z]+)$")


def read_bytes(name: str, given: int | str) -> int:
    """A number of bytes, at least 1.

    Args:
        name: the field's name, for the error.
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


def say_bytes(size: int) -> str:
    """A size exactly, in the largest unit of which it is a whole number: ``"512MiB"``."""
    unit, unit_size = next((unit, unit_size) for unit, unit_size in _UNITS if size % unit_size == 0)
    return f"{size // unit_size}{unit}"


def about_bytes(size: int) -> str:
    """A size in three digits or so: ``"1.46 GiB"``, ``"64.0 KiB"``, ``"12 B"``."""
    for unit, unit_size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= 0.9995 * unit_size:
            amount = size / unit_size
            digits = 0 if abs(amount) >= 99.95 else 1 if abs(amount) >= 9.995 else 2
            return f"{amount:,.{digits}f} {unit}"
    return f"{size:,} B"
