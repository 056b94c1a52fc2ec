"""What every codec promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hfkv.codecs.autocast import in_own_precision

Planes = tuple[torch.Tensor, ...]

# Scales are kept in bfloat16: two bytes, and every magnitude a model can produce fits.
SCALE_DTYPE = torch.bfloat16

# Numbers encoded together on a CPU.
_TOGETHER = 1 << 18


class Codec(ABC):
    """Writes `[B, H, T, D]` as planes `[B, H, T, d_i]` and reads them back.

    The law: *row-local*. What is written for a token depends on that token's row alone and is the same bits
    whatever else is encoded with it, so append, drop, page, offload, beam-select and crop commute with
    the codec and nothing is ever encoded twice.

    Attributes:
        name: in a `KVConfig`.
        plane_names: of the planes that `encode` returns, in their order.
    """

    name: str
    plane_names: tuple[str, ...]

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
