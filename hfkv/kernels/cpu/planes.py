"""Stretches of encoded planes on a CPU, as matrices that its products take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.merge import Attended
from hfkv.stores.layout import Layout


class Stretch(NamedTuple):
    """Some tokens of some rows: ``numbers · scale + low`` is what they decode to, before int4 is rotated back.

    Attributes:
        numbers: int8, bfloat16 or float32 `[rows * H, n, D]`.
        scale: float32 `[rows * H, n]`, or None.
        low: float32 `[rows * H, n]`, or None.
    """

    numbers: torch.Tensor
    scale: torch.Tensor | None
    low: torch.Tensor | None


def read_stretch(
    encoded: Encoded, layout: Layout, rows: slice, begin: int, end: int, dtype: torch.dtype = torch.int8
) -> Stretch:
    """The tokens `begin .. end - 1` of `rows`, as few bytes as products in `dtype` take.

    With int8, int8 as it lies, int4 unpacked to int8, fp8 as float32. With bfloat16 (or float32), which hold any of
    these numbers exactly, all of them in it, and none as it lies if that is its own dtype.
    """
    planes = tuple(plane.flatten(0, 1) for plane in layout.read(encoded.planes, begin, end, rows))
    if encoded.codec == "none":
        return Stretch(planes[0].to(dtype), None, None)
    data, scale = planes
    if encoded.codec == "fp8":
        numbers = _from_fp8(data, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        return Stretch(numbers, scale[..., 0].float(), None)
    if encoded.codec == "int8":
        return Stretch(data.to(dtype), scale[..., 0].float(), None)
    scale, low = scale.float().unbind(-1)
    return Stretch(_unpacked(data, encoded.head_dim).to(dtype), scale, low + _CENTRE * scale)


def decode_stretch(
    encoded: Encoded, layout: Layout, rows: slice, begin: int, end: int, dtype: torch.dtype
) -> torch.Tensor:
    """The tokens `begin .. end - 1` of `rows` as `[rows, H, n, D]` of `dtype`; int4 stays rotated, none as it lies."""
    if encoded.codec == "none":
        return layout.read(encoded.planes, begin, end, rows)[0].to(dtype)
    numbers, scale, low = read_stretch(encoded, layout, rows, begin, end)
    assert scale is not None
    if low is None and dtype == torch.bfloat16:
        # Both factors are exact in bfloat16: rounded once, as the codec does.
        states = numbers.to(dtype).mul_(scale[..., None].to(dtype))
    else:
        states = numbers * scale[..., None]
        states = (states if low is None else states.add_(low[..., None])).to(dtype)
    return states.unflatten(0, (-1, encoded.planes[0].shape[1]))


def rotated_back(attended: Attended, codec: str, dtype: torch.dtype) -> Attended:
    """Attention to values that int4 has rotated, in `dtype`."""
    out = rotate_states(attended.out.float()) if codec == "int4" else attended.out
    return Attended(out.to(dtype), attended.lse)


# The numbers of int4 are 0 .. 15; about their centre, sums of them and of `low` nearly cancel no more.
_CENTRE = 8


def _unpacked(packed: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Two nibbles a byte, less `_CENTRE`, as int8 `[..., head_dim]`: the low ones are the first half of the row."""
    half = packed.shape[-1]
    signed = (packed ^ 0x88).view(torch.int8)  # n ^ 8 is n - 8 in two's complement, where shifts extend its sign
    numbers = torch.empty(*packed.shape[:-1], 2 * half, dtype=torch.int8)
    torch.bitwise_left_shift(signed, 4, out=numbers[..., :half]).bitwise_right_shift_(4)
    torch.bitwise_right_shift(signed, 4, out=numbers[..., half:])
    return numbers[..., :head_dim]


def _from_fp8(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn as `dtype`, by its bits: 4 times as fast as torch's own cast. Its NaNs come out as 480."""
    # Sign-extended and shifted, sign and magnitude stand where a float32 or bfloat16 has them, the exponent 120 too
    # low.
    if dtype == torch.bfloat16:
        bits = numbers.view(torch.int8).to(torch.int16)
        bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)
    else:
        bits = numbers.view(torch.int8).to(torch.int32)
        bits.bitwise_left_shift_(20).bitwise_and_(-0x78100000)
    return bits.view(dtype).mul_(2.0**120)
