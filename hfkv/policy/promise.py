"""A promised change of a model's loss: a share, and the percentage that people write."""

from __future__ import annotations

import re
from decimal import Decimal

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,20})?)%")
_LEAST = 1e-6


def check_share(name: str, given: float) -> float:
    """A share from a millionth to below 1.

    Args:
        name: the field's name, for the error.
        given: the number.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(given, float | int) or isinstance(given, bool):
        raise TypeError(f"{name} must be a share such as 0.005 (0.5 %), got {given!r}")
    if not _LEAST <= given < 1:
        raise ValueError(
            f'{name} must be a share from {_LEAST} to below 1, got {given!r}; codec="none" changes nothing'
        )
    return float(given)


def read_percent(text: str) -> float:
    """Reads ``"0.5%"`` as 0.005.

    Raises:
        ValueError: it is no percentage.
    """
    match = _PERCENT.fullmatch(text.strip())
    if match is None:
        raise ValueError
    return float(Decimal(match[1]).scaleb(-2))


def say_percent(share: float) -> str:
    """Writes 0.005 as ``"0.5%"``, with the digits that `read_percent` needs to give the same number."""
    percent = f"{Decimal(repr(share)).scaleb(2):f}"
    return f"{percent.rstrip('0').rstrip('.') if '.' in percent else percent}%"
