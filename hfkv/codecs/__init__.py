"""Codecs: row-local ways to write `[B, H, T, D]` tensors as tuples of planes."""

from hfkv.codecs.base import Affine, Codec, Planes
from hfkv.codecs.fp8 import Fp8
from hfkv.codecs.int2 import Int2
from hfkv.codecs.int3 import Int3
from hfkv.codecs.int4 import Int4
from hfkv.codecs.int8 import Int8
from hfkv.codecs.none import Plain
from hfkv.codecs.pair import Codecs
from hfkv.codecs.registry import CODECS, register_codec

__all__ = [
    "CODECS",
    "Affine",
    "Codec",
    "Codecs",
    "Fp8",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Plain",
    "Planes",
    "register_codec",
]

for _codec in (Plain(), Int8(), Int4(), Fp8(), Int3(), Int2()):
    register_codec(_codec)
