"""Functions that a lower room calls and a higher one has, connected by name where hfkv starts (`hfkv/__init__.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

_connected: dict[str, str] = {}


def connect(targets: Mapping[str, str]) -> None:
    """Says where functions are: ``{"save_cache": "package.module:function"}``. Imports none of them."""
    _connected.update(targets)


def port(name: str) -> Callable[..., Any]:
    """The function that is connected as `name`; its module is imported now.

    Raises:
        KeyError: nothing is connected under this name.
    """
    module, _, function = _connected[name].partition(":")
    return getattr(import_module(module), function)
