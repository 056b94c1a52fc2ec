"""A record of the attributes a patch set, and of what they were."""

from __future__ import annotations

from typing import Any

_ABSENT = "hfkv: the instance had no such attribute"


class Undo:
    """Sets instance attributes and puts them back, newest first.

    It holds plain data, no closures: a deep copy of a patched model carries an undo of its own.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, remembering what the instance had."""
        self._before.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Puts everything back."""
        while self._before:
            owner, name, value = self._before.pop()
            if isinstance(value, str) and value == _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
