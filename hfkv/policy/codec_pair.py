"""The codecs of keys and of values as one word: ``"int8"`` for both, or a pair, ``"k:int8+v:int4"``."""

from __future__ import annotations

# The names of codecs: those of `hfkv.codecs`, which is not imported for them, and what `register_codec` has added.
CODEC_WORDS = ["none", "int8", "int4", "fp8", "int3", "int2"]


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


def checked_codec(field: str, codec: object) -> str:
    """The word for a codec, or for the codecs of keys and of values, as configs keep it.

    Args:
        field: the field's name, for the error.
        codec: what was given.

    Raises:
        ValueError: naming what was given and what is allowed.
    """
    try:
        sides = sides_of(codec) if isinstance(codec, str) else ()
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    if not sides or not all(side in CODEC_WORDS for side in sides):
        allowed = ", ".join(CODEC_WORDS)
        also = "" if len(set(sides)) < 2 else " for keys and for values"
        raise ValueError(f"{field} must be one of {allowed}{also}, got {codec!r}")
    return word_of(*sides)
