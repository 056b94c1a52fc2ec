"""`Int2`: two bits a number along a trellis, after a Hadamard rotation of the row."""

from __future__ import annotations

import torch

from hfkv.codecs import trellis
from hfkv.codecs.base import Affine, Codec, Planes
from hfkv.codecs.hadamard import rotate
from hfkv.codecs.log_scale import best_scale, has_numbers, nearest_scale, row_sums, shifted, to_floats


class Int2(Codec):
    """Codec to a path through a trellis of the rotated row: ``rotate(x) ≈ number · scale``, ⌈D / 4⌉ + 2 bytes a row.

    Two bits choose one of four numbers, and which four, the six bits before say (QTIP, arXiv 2406.11235): all numbers
    of a row are chosen together, by the least squared error. To read them is to look up each window of eight bits. Of a
    normal row a trellis loses 0.072 to 0.075 of the squares where two bits of each number on their own lose 0.1175.
    """

    name = "int2"
    plane_names = ("codes", "scale")
    numbers = torch.int8
    is_rotated = True
    takes_mean = True
    is_coarse = True
    loss_percent = 3.553

    def _encode(self, x: torch.Tensor) -> Planes:
        y = rotate(x.float())
        squares = row_sums(y * y)
        middle = nearest_scale(squares * (1 / (y.shape[-1] * trellis.DEVIATION * trellis.DEVIATION)))
        is_there = has_numbers(middle)
        half = to_floats(shifted(middle, 0)) * 0.5
        doubled = torch.where(is_there, (y / half).round_(), 0).int()
        strings, numbers = trellis.encode(doubled.flatten(0, -2))
        strings, numbers = (part.view(*x.shape[:-1], part.shape[-1]) for part in (strings, numbers))
        products, of_codes = ((numbers * part).sum(-1, keepdim=True).float() for part in (doubled, numbers))
        scale, _ = best_scale(squares, products * half, of_codes)
        return strings * is_there, torch.where(is_there, scale, middle).to(torch.uint8)

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return rotate(self.decode_rows(planes, head_dim)).to(dtype)

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        strings, scale = planes
        return Affine(trellis.decode(strings, head_dim).to(dtype), to_floats(scale[..., 0]), None)
