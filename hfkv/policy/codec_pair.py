"""The codecs of keys and of values as one word: ``"int8"`` for both, or a pair, ``"k:int8+v:int4"``."""

from __future__ import annotations


def sides_of(codec: str) -> tuple[str, str]:
    """The names of the codecs of keys and of values.

    Raises:
        ValueError: it has a colon and is no pair.
    """
    if ":" not in codec:
        return codec, codec
    words = codec.split("+")
    sides = dict(word.split(":", 1) for word in words if ":" in word)
    if len(words) != 2 or sides.keys() != {"k", "v"}:
        raise ValueError(
            f"codecs of keys and of values are written k:CODEC+v:CODEC, such as k:int8+v:int4, got {codec!r}"
        )
    return sides["k"], sides["v"]


def word_of(key: str, value: str) -> str:
    """The one word for the codecs of keys and of values, which are the same as a rule."""
    return key if key == value else f"k:{key}+v:{value}"
