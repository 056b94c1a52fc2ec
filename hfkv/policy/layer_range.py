"""The layers that a key of `KVConfig.layers` names: ``"3"`` or ``"0-1"``."""

from __future__ import annotations

import re

_LAYER_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def layer_range(key: str) -> range:
    """The indices that a key names.

    Raises:
        ValueError: it is none, or ends before it starts.
    """
    match = _LAYER_RANGE.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise ValueError(f'KVConfig.layers takes keys such as "3" or "0-1", got {key!r}')
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"KVConfig.layers key {key!r} ends before it starts")
    return range(first, last + 1)
