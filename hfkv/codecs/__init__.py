"""How numbers are written: row-local codecs between `[B, H, T, D]` tensors and tuples of planes."""

from hfkv.codecs.base import Codec
from hfkv.codecs.fp8 import Fp8
from hfkv.codecs.int4 import Int4
from hfkv.codecs.int8 import Int8
from hfkv.codecs.none import Plain

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Plain(), Int8(), Int4(), Fp8())}

__all__ = ["CODECS", "Codec", "Fp8", "Int4", "Int8", "Plain"]
