"""Every public name of hfkv with its signature: ``python -m tests.public_api`` prints what `public_api.txt` holds."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

PACKAGES = ("hfkv", "hfkv.eval", "hfkv.experts.offload", "hfkv.planning", "hfkv.patches")


def signature(function: Any) -> str:
    """A signature without the rooms that its types come from."""
    try:
        text = str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_]\w*)", "", text)
    return re.sub(r"<(\w+) (?:[^<>]|<\w+>)*>", r"<\1>", text.replace("'", ""))


def members(found: type) -> Iterator[str]:
    """The public methods, properties and fields of a class, those of its bases in hfkv included."""
    seen = set()
    for base in found.__mro__:
        if not base.__module__.startswith("hfkv"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            value = getattr(value, "__func__", value)
            yield f"{name}{signature(value)}" if inspect.isfunction(value) else name
        for name in vars(base).get("__annotations__", {}):
            if not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name


def listing() -> str:
    """The names of all public packages, one a line, with those of classes below them."""
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in sorted(names):
            value = getattr(module, name)
            if inspect.isclass(value):
                lines.append(f"{package}.{name}{signature(value)}")
                lines += sorted(f"    .{member}" for member in members(value))
            elif inspect.isfunction(value):
                lines.append(f"{package}.{name}{signature(value)}")
            elif not inspect.ismodule(value):
                lines.append(f"{package}.{name}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(listing(), end="")
