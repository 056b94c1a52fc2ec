"""`Int3`: three bits a number, after a Hadamard rotation of the row."""

from __future__ import annotations

import torch

from hfkv.codecs.base import Affine, Codec, Planes
from hfkv.codecs.hadamard import rotate
from hfkv.codecs.log_scale import best_scale, has_numbers, nearest_scale, row_sums, shifted, to_floats

# The levels of the best quantiser of eight for normal numbers (Lloyd-Max), in whole numbers: beside 57.2, the standard
# deviation, 14.0, 43.2, 76.9 and 123.1. Between them, where the next one begins.
_MAGNITUDES, _BOUNDS, _DEVIATION = (14, 43, 77, 123), (28.5, 60.0, 100.0), 57.2
# The scales that levels are found with, in steps from the one of the root mean square. Each of them finds its best own.
_TRIED = (0, -1, 1, -2, 2)


class Int3(Codec):
    """Codec to eight levels of the rotated row: ``rotate(x) ≈ level · scale``, 3 ⌈D / 8⌉ + 1 bytes a row.

    A rotated row is nearly normal, so that its levels are those which suit normal numbers, closer where these are
    dense. The scale is the one of the least cost among some (`best_scale`). Numbers are magnitudes of two bits, and
    signs: eighth `i` of the row has bit `i` of the last D / 8 bytes, the signs', and of the bytes before, of the first
    or the second half of them in turn, two bits: so that unpacking needs no interleaving.
    """

    name = "int3"
    plane_names = ("codes", "scale")
    numbers = torch.int8
    is_rotated = True
    takes_mean = True
    is_coarse = True
    loss_percent = 1.326

    def _encode(self, x: torch.Tensor) -> Planes:
        y = rotate(x.float())
        sizes, squares = y.abs(), row_sums(y * y)
        middle = nearest_scale(squares * (1 / (y.shape[-1] * _DEVIATION * _DEVIATION)))
        (codes, scale, least), *others = (_tried(sizes, squares, shifted(middle, by)) for by in _TRIED)
        for other_codes, other_scale, cost in others:
            is_better = cost < least
            codes = torch.where(is_better, other_codes, codes)
            scale, least = torch.where(is_better, other_scale, scale), torch.where(is_better, cost, least)
        is_there = has_numbers(middle)
        signs = (y < 0) & is_there
        return _packed(codes * is_there, signs), torch.where(is_there, scale, middle).to(torch.uint8)

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return rotate(self.decode_rows(planes, head_dim)).to(dtype)

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        packed, scale = planes
        return Affine(_unpacked(packed, head_dim).to(dtype), to_floats(scale[..., 0]), None)


def _tried(
    sizes: torch.Tensor, squares: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes of magnitudes `[..., D]` under a scale `[..., 1]`, the scale that suits them, and what it costs."""
    step = to_floats(scale)
    first, second, third = (sizes >= step * bound for bound in _BOUNDS)
    codes = first.to(torch.uint8) + second + third
    numbers = _magnitudes(codes).float()
    return codes, *best_scale(squares, row_sums(sizes * numbers), row_sums(numbers * numbers))


def _magnitudes(codes: torch.Tensor) -> torch.Tensor:
    """The magnitudes of codes, uint8 of the same shape: as sums, which are faster than a table of bytes."""
    high = codes >> 1
    return codes * 29 + high * 5 + (codes & high) * 17 + 14


def _packed(codes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Packs codes and signs `[..., D]` to bytes `[..., 3 ⌈D / 8⌉]`."""
    missing = -codes.shape[-1] % 8
    if missing:
        codes, signs = (torch.nn.functional.pad(part, (0, missing)) for part in (codes, signs))
    quarters = codes.chunk(4, dim=-1)
    pairs = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    eighths = signs.to(torch.uint8).chunk(8, dim=-1)
    bits = eighths[0]
    for place, eighth in enumerate(eighths[1:], 1):
        bits = bits | eighth << place
    return torch.cat((pairs, bits), dim=-1)


def _unpacked(packed: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Unpacks bytes to signed magnitudes, int8 `[..., head_dim]`."""
    eighth = packed.shape[-1] // 3
    pairs, bits = packed.split([2 * eighth, eighth], dim=-1)
    codes = torch.cat([(pairs >> 2 * place) & 3 for place in range(4)], dim=-1)[..., :head_dim]
    signs = torch.cat([(bits >> place) & 1 for place in range(8)], dim=-1)[..., :head_dim].view(torch.int8)
    # A negative number is the complement of the magnitude, and one more.
    return (_magnitudes(codes).view(torch.int8) ^ -signs) + signs
