"""Whether what is registered under a name is the same thing once more."""

from __future__ import annotations


def is_redefined(known: object, new: object) -> bool:
    """Whether both are of one class, or of one that was defined twice in one place: a notebook's cell run again."""
    old, now = type(known), type(new)
    return (old.__module__, old.__qualname__) == (now.__module__, now.__qualname__)
