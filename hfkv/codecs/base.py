"""What every codec promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from hfkv.codecs.autocast import in_own_precision

Planes = tuple[torch.Tensor, ...]

# Scales are kept in bfloat16: two bytes, and every magnitude a model can produce fits.
SCALE_DTYPE = torch.bfloat16

# Numbers encoded together on a CPU.
_TOGETHER = 1 << 18


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
        name: the word for it in a `KVConfig`.
        plane_names: names of the planes that `encode` returns, in their order.
        is_lossless: whether what is decoded is what was encoded, bit for bit; its one plane is that itself.
        numbers: the dtype that holds the numbers of `affine` exactly: int8 for small integers, bfloat16 for others.
            None where there is no such form: kernels then attend to what `decode` gives.
        is_rotated: whether `affine` gives rows as `hfkv.codecs.hadamard.rotate` has turned them. Queries are turned
            likewise then, and what they attend to is turned back.
        loss_percent: what it adds to the loss of the bundled model over its whole held-out text
            (docs/understand/concepts.md), or None where that was not measured.
    """

    name: str
    plane_names: tuple[str, ...]
    is_lossless: bool = False
    numbers: torch.dtype | None = None
    is_rotated: bool = False
    loss_percent: float | None = None

    @in_own_precision
    def encode(self, x: torch.Tensor) -> Planes:
        """Encodes, on a CPU so many tokens at a time that what is computed on the way stays in the caches.

        Args:
            x: `[B, H, T, D]`, bf16, fp16 or fp32; T may be 0. NaN and infinity come back as NaN at worst.

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

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> Planes:
        """All of `x` at once."""

    @in_own_precision
    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Decodes planes `[B, H, T, d_i]` to `[B, H, T, head_dim]` of `dtype`."""
        return self._decode(planes, head_dim, dtype)

    @abstractmethod
    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """See `decode`."""

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        """Planes as numbers that products of `dtype` take, where `numbers` says that there is such a form.

        Args:
            planes: `[..., n, d_i]`.
            head_dim: D.
            dtype: int8, or bfloat16 or float32, which hold the numbers of all codecs exactly. Where int8 does not hold
                them, they come in float32.

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
    scale = (largest * (1 / steps)).to(SCALE_DTYPE)
    return torch.where(scale == 0, torch.ones_like(scale), scale)
