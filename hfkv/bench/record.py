"""Records out of JSON values: every field is there and of its type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Record = TypeVar("Record")

# What JSON values may be, by a word of a field's annotation.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "list[int]": (list,),
    "list[Any]": (list,),
    "dict[str, Any]": (dict,),
    "None": (type(None),),
}

_MOST = 1 << 64


def read_record(kind: type[Record], value: Any, where: str, **done: Any) -> Record:
    """A dataclass from a JSON object.

    Args:
        kind: its class, whose annotations say what the values are.
        value: the object.
        where: what it is, for the error.
        **done: fields that have been read already, in place of the object's.

    Raises:
        ValueError: it is no object, lacks a field, has one too many, or one of the wrong type.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    check_fields({name: str(field.type) for name, field in known.items() if name not in done}, value, where)
    missing = [name for name, field in known.items() if field.default is MISSING and name not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    unknown = [name for name in value if name not in known]
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}, which is unknown")
    return kind(**{**value, **done})


def check_fields(annotations: Mapping[str, str], value: Any, where: str, is_whole: bool = False) -> None:
    """Refuses a JSON object with a field that is not of its annotation, such as ``"int | None"``.

    Args:
        annotations: the fields by name.
        value: the object.
        where: what it is, for the error.
        is_whole: whether all of them have to be there.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_short(value)}")
    missing = [name for name in annotations if is_whole and name not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for name, annotation in annotations.items():
        if name in value and not _is(annotation, value[name], is_error=name.startswith("error")):
            raise ValueError(f"{where}: {name} must be {annotation}, got {_short(value[name])}")


def _is(annotation: str, value: Any, is_error: bool) -> bool:
    kinds = tuple(kind for word in annotation.split(" | ") for kind in _KINDS[word])
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return False
    if annotation.startswith("list[int]"):
        return isinstance(value, list) and all(_is("int", item, False) for item in value)
    if isinstance(value, int):
        return abs(value) <= _MOST
    # The error of a wrong contender may be NaN; no number that was measured is.
    return not isinstance(value, float) or is_error or math.isfinite(value)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:60]}..."
