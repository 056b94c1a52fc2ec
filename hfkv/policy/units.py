"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("KiB", 2**10), ("kB", 10**3), ("B", 1))
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)")
MOST_BYTES = 1 << 62
MOST_COUNT = 1 << 50  # of tokens or rows
# Digits of a number as people write one; with more, only what it would be compared with is asked.
_MOST_DIGITS = 40


def read_bytes(name: str, given: int | str) -> int:
    """A number of bytes, at least 1 and at most `MOST_BYTES`.

    Args:
        name: the field's name, for the error.
        given: a number, or one with a unit: ``"512MiB"``, ``"1.5GB"``. Of a fraction the whole bytes count.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise TypeError(f'{name} must be a number of bytes or a str such as "512MiB", got {given!r}')
    size = given
    if isinstance(given, str):
        match = _SIZE.fullmatch(given.strip().lower())
        sizes = {unit.lower(): size for unit, size in _UNITS}
        if match is None or match[2] not in sizes:
            units = "B, kB, MB, GB, KiB, MiB, GiB"
            raise ValueError(f'{name} takes a size such as "512MiB" or "2GB" ({units}), got {shortened(given)!r}')
        size = int(read_number(match[1]) * sizes[match[2]])
    assert isinstance(size, int)
    if size < 1:
        raise ValueError(f"{name} must be at least 1 byte, got {shortened(given)}")
    if size > MOST_BYTES:
        raise ValueError(f"{name} must be at most {MOST_BYTES:,} bytes, got {shortened(given)}; say less")
    return size


def read_number(text: str) -> Fraction:
    """A number in digits, exactly, and of hundreds of digits one that is as far beyond what can be asked for."""
    whole, _, fraction = text.partition(".")
    if len(whole) > _MOST_DIGITS:
        whole = whole.lstrip("0")[:_MOST_DIGITS] or "0"
    return Fraction(f"{whole}.{fraction[:_MOST_DIGITS] or 0}")


def shortened(given: object) -> str:
    """What was given, of which a long one is cut."""
    try:
        words = str(given)
    except ValueError:  # an int of thousands of digits
        return "a number of thousands of digits"
    return words if len(words) <= _MOST_DIGITS else f"{words[:_MOST_DIGITS]}... ({len(words)} characters)"


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
