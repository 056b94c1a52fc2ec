"""Four bits a number, after a Hadamard rotation of the row."""

from __future__ import annotations

import torch

from hfkv.codecs.base import SCALE_DTYPE, Codec, Planes, scale_for
from hfkv.codecs.hadamard import rotate

LEVELS = 15


class Int4(Codec):
    """Asymmetric int4 of the rotated row: ``rotate(x) ≈ q · scale + low``, D / 2 + 4 bytes a row.

    The rotation evens out the channels (QuaRot, arXiv 2404.00456), so that one scale and one offset a row do
    where per-channel groups would be needed otherwise. The first half of the row lies in the low
    nibbles and the second half in the high ones, so that unpacking needs no interleaving.
    """

    name = "int4"
    plane_names = ("codes", "scale_and_low")

    def _encode(self, x: torch.Tensor) -> Planes:
        y = rotate(x.float())
        low = y.amin(dim=-1, keepdim=True).to(SCALE_DTYPE)
        scale = scale_for(y.amax(dim=-1, keepdim=True) - low.float(), LEVELS)
        q = ((y - low.float()) / scale.float()).round_().clamp_(0, LEVELS).to(torch.uint8)
        if q.shape[-1] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        first, second = q.chunk(2, dim=-1)
        return first | (second << 4), torch.cat((scale, low), dim=-1)

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        packed, scale_and_low = planes
        scale, low = scale_and_low.float().chunk(2, dim=-1)
        q = torch.cat((packed & 0xF, packed >> 4), dim=-1)[..., :head_dim]
        return rotate(q.float() * scale + low).to(dtype)
