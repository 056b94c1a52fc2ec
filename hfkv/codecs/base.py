"""`Codec`: the interface of every codec, and the arithmetic of scales."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from hfkv.codecs.autocast import in_own_precision, is_on

Planes = tuple[torch.Tensor, ...]

# Scales are kept in bfloat16: two bytes, and every magnitude a model can produce fits.
SCALE_DTYPE = torch.bfloat16

_MOST_HALF = torch.finfo(torch.float16).max

# Numbers encoded together on a CPU.
_TOGETHER = 1 << 18
# So few tokens are copied to be encoded in one go: each operation takes longer than their numbers do.
_FEW = 8


class Affine(NamedTuple):
    """Encoded rows as ``numbers · scale + low``, before a rotated row is rotated back.

    Attributes:
        numbers: int8, bfloat16 or float32 `[..., n, D]`.
        scale: float32 `[..., n]`, or None for 1.
        low: float32 `[..., n]`, or None for 0.
    """

    numbers: torch.Tensor
    scale: torch.Tensor | None
    low: torch.Tensor | None


class Codec(ABC):
    """Writes `[B, H, T, D]` as planes `[B, H, T, d_i]` and reads them back.

    The law: *row-local*. What is written for a token depends on that token's row alone and is the same bits
    whatever else is encoded with it, so append, drop, page, offload, beam-select and crop commute with
    the codec and nothing is ever encoded twice.

    Attributes:
        name: the codec's word in a `KVConfig`.
        plane_names: names of the planes that `encode` returns, in their order.
        is_lossless: whether `decode` gives back what was encoded, bit for bit; the one plane is then the input itself.
        numbers: the dtype that holds the numbers of `affine` exactly: int8 for small integers, bfloat16 for others.
            None where the codec has no such form: kernels then attend to decoded tokens.
        is_rotated: whether `affine` gives rows that `hfkv.codecs.hadamard.rotate` has rotated. Queries are then rotated
            likewise, and the output of attention is rotated back.
        is_coarse: whether it loses so much that it is taken only where somebody names it, and never to meet a budget.
        takes_mean: whether a patched model's keys are written less their mean (`hfkv.codecs.key_mean`): worth it where
            numbers have few bits.
        loss_percent: percent by which the codec, of a patched model, raises the bundled model's loss over its whole
            held-out text (docs/understand/concepts.md), or None where that was not measured.
    """

    name: str
    plane_names: tuple[str, ...]
    is_lossless: bool = False
    numbers: torch.dtype | None = None
    is_rotated: bool = False
    is_coarse: bool = False
    takes_mean: bool = False
    loss_percent: float | None = None

    @in_own_precision
    def encode(self, x: torch.Tensor) -> Planes:
        """Encodes tokens; on a CPU in stretches, so that intermediate results stay in its caches.

        Args:
            x: tokens `[B, H, T, D]`, bf16, fp16 or fp32; T may be 0. NaN and infinity decode to NaN at worst.

        Returns:
            Planes `[B, H, T, d_i]`, the data first.
        """
        if x.shape[3] == 0:  # the rotary keys of latent attention without positions: nothing, and a scale
            data, *scales = self._encode(x.new_zeros(*x.shape[:3], 1))
            return (data[..., :0], *scales)
        tokens = max(1, _TOGETHER * x.shape[2] // max(x.numel(), 1))
        if x.device.type != "cpu" or x.shape[2] <= tokens:
            return self._encode(x)
        # By the law, the same bits as all at once.
        return tuple(torch.cat(planes, dim=2) for planes in zip(*map(self._encode, x.split(tokens, 2)), strict=True))

    def encode_both(self, keys: torch.Tensor, values: torch.Tensor) -> Planes:
        """Encodes keys `[B, H, T, Dk]` and values `[B, H, T, Dv]`, few of equal shapes together.

        Returns:
            The planes of the keys, and then those of the values.
        """
        if keys.shape != values.shape or keys.shape[2] > _FEW or is_on():
            return self.encode(keys) + self.encode(values)
        halves = [plane.chunk(2, 1) for plane in self._encode(torch.cat((keys, values), dim=1))]
        return (*[half[0] for half in halves], *[half[1] for half in halves])

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> Planes:
        """Encodes all of `x` at once."""

    @in_own_precision
    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Decodes planes `[B, H, T, d_i]` to `[B, H, T, head_dim]` of `dtype`; what is finite stays so in float16."""
        if dtype != torch.float16 or self.is_lossless:
            return self._decode(planes, head_dim, dtype)
        # What was rounded up from the largest of the numbers there are would be infinite.
        return self._decode(planes, head_dim, torch.float32).clamp_(-_MOST_HALF, _MOST_HALF).to(dtype)

    @abstractmethod
    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Decodes planes; see `decode`."""

    def decode_rows(self, planes: Planes, head_dim: int) -> torch.Tensor:
        """Decodes planes to float32 rows `[..., n, D]`, which stay rotated where the codec rotates them."""
        if self.numbers is None:
            return self.decode(planes, head_dim, torch.float32)
        numbers, scale, low = self.affine(planes, head_dim, torch.float32)
        scaled = numbers if scale is None else numbers * scale[..., None]
        return scaled if low is None else scaled + low[..., None]

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        """Gives planes as numbers that products of `dtype` take; only a codec with `numbers` has this form.

        Args:
            planes: encoded rows `[..., n, d_i]`.
            head_dim: width D of a decoded row.
            dtype: int8, bfloat16 or float32; the last two hold the numbers of all codecs exactly. Numbers that int8
                does not hold come in float32.

        Raises:
            NotImplementedError: the codec has no such form.
        """
        raise NotImplementedError(f"the codec {self.name!r} has no affine form")


def row_absmax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, fp32 `[..., 1]`."""
    return x.abs().amax(dim=-1, keepdim=True).float()


def scale_for(largest: torch.Tensor, steps: float) -> torch.Tensor:
    """A 16-bit scale that maps `largest` to about `steps`; rows of zeros get a scale of 1.

    It is rounded *before* anything is quantised with it, so that its rounding costs no accuracy.
    """
    # A product, not a quotient: for that torch gives other bits on a GPU than on a CPU.
    scale = (largest * _inverse(steps)).to(SCALE_DTYPE)
    return scale.masked_fill_(scale.logical_not(), 1)


@functools.cache
def _inverse(steps: float) -> torch.Tensor:
    """One by `steps`, as a tensor: torch takes twice as long to multiply few numbers by one of Python's."""
    with torch.inference_mode(False):
        return torch.tensor(1 / steps, dtype=torch.float32, device="cpu")
