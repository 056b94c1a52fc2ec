"""Eight-bit floats, one scale per token and kv head."""

from __future__ import annotations

import torch

from hfkv.codecs.base import Codec, Planes, row_absmax, scale_for

E4M3_MAX = 448.0


class Fp8(Codec):
    """float8_e4m3fn under a scale that brings the row's largest magnitude to 448: D + 2 bytes a row."""

    name = "fp8"
    plane_names = ("codes", "scale")

    def _encode(self, x: torch.Tensor) -> Planes:
        scale = scale_for(row_absmax(x), E4M3_MAX)
        # The cast does not saturate: what the scale's rounding leaves above 448 would become NaN.
        q = (x.float() / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX)
        return q.to(torch.float8_e4m3fn), scale

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        q, scale = planes
        return (q.float() * scale.float()).to(dtype)
