"""The codecs by name: the one place where the rest of hfkv looks them up."""

from __future__ import annotations

from hfkv.codecs.base import Codec
from hfkv.policy.words import add_codec_word

CODECS: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Makes a codec known under its name, in configs (``KVConfig(codec="int3")``) and in words (``"int3+paged"``).

    Raises:
        ValueError: its name is no plain word, means something else among the words, or is another codec's.
    """
    known = CODECS.get(codec.name)
    if known is not None and type(known) is not type(codec):
        raise ValueError(f"there is a codec {codec.name!r} already ({type(known).__name__}); give yours another name")
    add_codec_word(codec.name)
    CODECS[codec.name] = codec
