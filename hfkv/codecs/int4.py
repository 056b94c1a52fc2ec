"""`Int4`: four bits a number, after a Hadamard rotation of the row."""

from __future__ import annotations

import torch

from hfkv.codecs.base import SCALE_DTYPE, Affine, Codec, Planes, scale_for
from hfkv.codecs.hadamard import rotate

LEVELS = 15
_FEW = 1 << 12
# The codes are 0 .. 15; about their centre, sums of them and of `low` nearly cancel no more.
_CENTRE = 8


class Int4(Codec):
    """Codec to asymmetric int4 of the rotated row: ``rotate(x) ≈ q · scale + low``, D / 2 + 4 bytes a row.

    The rotation evens out the channels (QuaRot, arXiv 2404.00456), so that one scale and one offset a row are
    enough; without it, groups of channels would be needed. The first half of the row lies in the low
    nibbles and the second half in the high ones, so that unpacking needs no interleaving.
    """

    name = "int4"
    plane_names = ("codes", "scale_and_low")
    numbers = torch.int8
    is_rotated = True
    takes_mean = True
    loss_percent = 0.254

    def _encode(self, x: torch.Tensor) -> Planes:
        y = rotate(x.float())
        if y.numel() <= _FEW:
            least, most = torch.aminmax(y, dim=-1, keepdim=True)
        else:  # four times as fast
            least, most = y.amin(dim=-1, keepdim=True), y.amax(dim=-1, keepdim=True)
        low = (least + 0.0).to(SCALE_DTYPE)  # of 0.0 and -0.0 no order says which is the least
        origin = low.float()
        scale = scale_for(most - origin, LEVELS)
        q = (y - origin).div_(scale.float()).round_().clamp_(0, LEVELS).to(torch.uint8)
        if q.shape[-1] % 2:
            q = torch.nn.functional.pad(q, (0, 1))
        first, second = q.chunk(2, dim=-1)
        return first | (second << 4), torch.cat((scale, low), dim=-1)

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return rotate(self.decode_rows(planes, head_dim)).to(dtype)

    def decode_rows(self, planes: Planes, head_dim: int) -> torch.Tensor:
        packed, scale_and_low = planes
        scale, low = scale_and_low.float().chunk(2, dim=-1)
        q = torch.cat((packed & 0xF, packed >> 4), dim=-1)[..., :head_dim]
        return q.float() * scale + low

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        packed, scale_and_low = planes
        scale, low = scale_and_low.float().unbind(-1)
        # Rows whose numbers are all the same have a scale of 1, beside which small numbers would be lost. Scales are
        # looked at first: to go through all codes takes longer than to unpack them.
        is_even = scale == 1
        if head_dim and scale.device.type == "cpu" and is_even.any():
            scale = scale.masked_fill(is_even & (packed.amax(dim=-1) == 0), 0)
        return Affine(_unpacked(packed, head_dim).to(dtype), scale, low + _CENTRE * scale)


def _unpacked(packed: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Unpacks two nibbles a byte, less `_CENTRE`, to int8 `[..., head_dim]`; low nibbles are the row's first half."""
    half = packed.shape[-1]
    signed = (packed ^ 0x88).view(torch.int8)  # n ^ 8 is n - 8 in two's complement, where shifts extend its sign
    numbers = torch.empty(*packed.shape[:-1], 2 * half, dtype=torch.int8, device=packed.device)
    torch.bitwise_left_shift(signed, 4, out=numbers[..., :half]).bitwise_right_shift_(4)
    torch.bitwise_right_shift(signed, 4, out=numbers[..., half:])
    return numbers[..., :head_dim]
