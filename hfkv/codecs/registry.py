"""The registry of codecs by name, in which the rest of hfkv looks them up."""

from __future__ import annotations

from hfkv.codecs.base import Codec
from hfkv.policy.words import add_codec_word

CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Registers a codec under its name, for configs (``KVConfig(codec="int3")``) and words (``"int3+paged"``).

    Raises:
        ValueError: the name is no plain word, has another meaning among the words, or belongs to another codec.
    """
    known = CODECS.get(codec.name)
    if known is not None and type(known) is not type(codec):
        raise ValueError(f"there is a codec {codec.name!r} already ({type(known).__name__}); give yours another name")
    add_codec_word(codec.name)
    CODECS[codec.name] = codec
