"""`Fp8`: eight-bit floats with one scale per token and kv head."""

from __future__ import annotations

import functools

import torch

from hfkv.codecs.base import Affine, Codec, Planes, row_absmax, scale_for

E4M3_MAX = 448.0
_FEW = 1 << 12


class Fp8(Codec):
    """Codec to float8_e4m3fn, with a scale that brings the row's largest magnitude to 448: D + 2 bytes a row."""

    name = "fp8"
    plane_names = ("codes", "scale")
    numbers = torch.bfloat16
    loss_percent = 0.066

    def _encode(self, x: torch.Tensor) -> Planes:
        scale = scale_for(row_absmax(x), E4M3_MAX)
        # The cast does not saturate: what the scale's rounding leaves above 448 would become NaN.
        q = (x.float() / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX)
        return q.to(torch.float8_e4m3fn), scale

    def _decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        q, scale = planes
        return (q.float() * scale.float()).to(dtype)

    def decode_rows(self, planes: Planes, head_dim: int) -> torch.Tensor:
        q, scale = planes
        if q.device.type == "cpu" and q.numel() <= _FEW:
            numbers = _all().index_select(0, q.view(torch.uint8).int().flatten()).view(q.shape)
        else:
            numbers = _from_bits(q, torch.float32)
        return numbers.mul_(scale.float())

    def affine(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Affine:
        codes, scale = planes
        numbers = _from_bits(codes, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        return Affine(numbers, scale[..., 0].float(), None)


@functools.cache
def _all() -> torch.Tensor:
    """The 256 numbers there are, float32: few are looked up in the time of two operations."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


def _from_bits(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts float8_e4m3fn to `dtype` by its bits: 4 times as fast as torch's own cast. NaNs come out as 480."""
    # Sign-extended and shifted, sign and magnitude stand where a float32 or bfloat16 has them, the exponent 120 too
    # low.
    if dtype == torch.bfloat16:
        bits = numbers.view(torch.int8).to(torch.int16)
        bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)
    else:
        bits = numbers.view(torch.int8).to(torch.int32)
        bits.bitwise_left_shift_(20).bitwise_and_(-0x78100000)
    return bits.view(dtype).mul_(2.0**120)
