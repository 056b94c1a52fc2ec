"""`Codecs`: how the keys of a layer are written, and how its values are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from hfkv.codecs.base import Codec, Planes
from hfkv.codecs.registry import CODECS
from hfkv.policy.codec_pair import sides_of, word_of


@dataclass(frozen=True, eq=False, slots=True)
class Codecs:
    """The codec of keys and the codec of values, the same one as a rule.

    Attributes:
        key, value: the codecs.
        name: both in one word, as a `KVConfig` has them: ``"int8"``, or ``"k:int8+v:int4"``.
        is_pair: whether they are two.
        is_lossless: whether neither loses anything.
    """

    key: Codec
    value: Codec
    name: str = field(init=False)
    is_pair: bool = field(init=False)
    is_lossless: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", word_of(self.key.name, self.value.name))
        object.__setattr__(self, "is_pair", self.key is not self.value)
        object.__setattr__(self, "is_lossless", self.key.is_lossless and self.value.is_lossless)

    @classmethod
    def named(cls, name: str) -> Codecs:
        """The registered codecs of a name.

        Raises:
            KeyError: there is none of that name.
        """
        key, value = sides_of(name)
        return cls(CODECS[key], CODECS[value])

    @property
    def loss_percent(self) -> float | None:
        """See `Codec`; of two codecs together nothing was measured."""
        return None if self.is_pair else self.key.loss_percent

    def of(self, part: Literal["key", "value"]) -> Codec:
        """The codec of keys or that of values."""
        return self.key if part == "key" else self.value

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> Planes:
        """Encodes keys `[B, H, T, Dk]` and values `[B, H, T, Dv]`: the planes of the keys, and then of the values."""
        return self.key.encode(keys) + self.value.encode(values)

    def encode_both(self, keys: torch.Tensor, values: torch.Tensor) -> Planes:
        """The same, few tokens of one codec together; see `Codec.encode_both`."""
        return self.encode(keys, values) if self.is_pair else self.key.encode_both(keys, values)
