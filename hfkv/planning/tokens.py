"""Numbers of tokens, as people write them."""

from __future__ import annotations

import re

from hfkv.policy.units import MOST_COUNT, read_number, shortened

_COUNT = re.compile(r"([0-9]+)([km]?)")
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def read_tokens(name: str, given: int | str) -> int:
    """Reads a number of tokens, at least 1.

    Args:
        name: the field's name, for the error.
        given: a number, or words such as ``"128k"`` (k is 1,024).

    Raises:
        ValueError: it is neither, or more than `MOST_COUNT`.
    """
    if isinstance(given, str):
        match = _COUNT.fullmatch(given.strip().lower())
        count = int(read_number(match[1])) if match else 0
        if match is None or count < 1:
            raise ValueError(
                f"{name} takes a number of tokens such as 4096, 128k or 1m (k is 1,024), got {shortened(given)!r}"
            )
        if count > MOST_COUNT // _UNITS[match[2]]:
            raise ValueError(f"{name} must be at most {MOST_COUNT:,}, got {shortened(given)}")
        return count * _UNITS[match[2]]
    check_count(name, given)
    return given


def check_count(name: str, value: object) -> None:
    """Refuses anything but a whole number of at least 1.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if value > MOST_COUNT:
        raise ValueError(f"{name} must be at most {MOST_COUNT:,}, got {shortened(value)}")
