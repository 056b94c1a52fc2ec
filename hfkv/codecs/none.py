"""`Plain`: the codec that changes nothing."""

from __future__ import annotations

import torch

from hfkv.codecs.base import Affine, Codec, Planes


class Plain(Codec):
    """Codec that keeps the model's own dtype, bit for bit."""

    name = "none"
    plane_names = ("states",)
    is_lossless = True
    loss_percent = 0.0

    def encode(self, x: torch.Tensor) -> Planes:
        return self._encode(x)

    def _encode(self, x: torch.Tensor) -> Planes:
        return (x,)

    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return self._decode(planes, head_dim, dtype)

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return planes[0].to(dtype)

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        return Affine(planes[0].to(torch.float32 if dtype == torch.int8 else dtype), None, None)
