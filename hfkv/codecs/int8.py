"""`Int8`: eight bits a number, with one scale per token and kv head."""

from __future__ import annotations

import torch

from hfkv.codecs.base import Affine, Codec, Planes, row_absmax, scale_for


class Int8(Codec):
    """Codec to symmetric int8: ``x ≈ q · scale``, D + 2 bytes a row.

    The error of an element is at most the row's largest magnitude / 254, plus the rounding of dtypes.
    """

    name = "int8"
    plane_names = ("codes", "scale")
    numbers = torch.int8
    loss_percent = 0.005

    def _encode(self, x: torch.Tensor) -> Planes:
        scale = scale_for(row_absmax(x), 127)
        q = (x.float() / scale.float()).round_().clamp_(-127, 127)
        return q.to(torch.int8), scale

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        q, scale = planes
        return (q.float() * scale.float()).to(dtype)

    def decode_rows(self, planes: Planes, head_dim: int) -> torch.Tensor:
        q, scale = planes
        return q.float() * scale.float()

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        codes, scale = planes
        return Affine(codes.to(dtype), scale[..., 0].float(), None)
