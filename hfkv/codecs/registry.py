"""The registry of codecs by name, in which the rest of hfkv looks them up."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from hfkv.codecs.base import Codec
from hfkv.policy.naming import is_redefined
from hfkv.policy.words import add_codec_word

CODECS: dict[str, Codec] = {}
# Called when a codec has been registered, by those who remember what they found out about codecs.
LISTENERS: list[Callable[[], None]] = []


def register_codec(codec: Codec) -> None:
    """Registers a codec under its name, for configs (``KVConfig(codec="int6")``) and words (``"int6+paged"``).

    A codec of the same class, or of its class defined anew (a notebook's cell run twice), takes its place.

    Raises:
        TypeError: it is no instance of `Codec`, or its name or the names of its planes are of the wrong type.
        ValueError: the name is no plain word, has another meaning among the words, or belongs to another codec.
    """
    _check(codec)
    known = CODECS.get(codec.name)
    if known is not None and not is_redefined(known, codec):
        raise ValueError(f"there is a codec {codec.name!r} already ({type(known).__name__}); give yours another name")
    add_codec_word(codec.name)
    CODECS[codec.name] = codec
    for changed in LISTENERS:
        changed()


def _check(codec: Codec) -> None:
    if inspect.isclass(codec):
        raise TypeError(f"a codec must be an instance, got the class {codec.__name__}; write {codec.__name__}()")
    if not isinstance(codec, Codec):
        raise TypeError(f"a codec must be an instance of a subclass of hfkv.codecs.Codec, got {codec!r}")
    where, name, planes = type(codec).__name__, getattr(codec, "name", None), getattr(codec, "plane_names", None)
    if not isinstance(name, str):
        raise TypeError(f'{where}.name must be a str, the word for the codec, got {name!r}; say name = "int6"')
    if not isinstance(planes, tuple) or not planes or not all(isinstance(plane, str) for plane in planes):
        raise TypeError(
            f"{where}.plane_names must be a tuple of a str for each plane that encode returns, got {planes!r}; say "
            'plane_names = ("data", "scale")'
        )
