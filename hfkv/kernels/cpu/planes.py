"""Stretches of encoded planes on a CPU, as matrices that its products take."""

from __future__ import annotations

import torch

from hfkv.codecs import Affine, Codec
from hfkv.codecs.hadamard import rotate_states
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.merge import Attended
from hfkv.stores.layout import Layout


def read_stretch(
    encoded: Encoded, layout: Layout, rows: slice, begin: int, end: int, dtype: torch.dtype = torch.int8
) -> Affine:
    """Reads the tokens `begin .. end - 1` of `rows` as numbers `[rows * H, n, D]` that products of `dtype` take."""
    planes = tuple(plane.flatten(0, 1) for plane in layout.read(encoded.planes, begin, end, rows))
    return encoded.codec.affine(planes, encoded.head_dim, dtype)


def decode_stretch(
    encoded: Encoded, layout: Layout, rows: slice, begin: int, end: int, dtype: torch.dtype
) -> torch.Tensor:
    """Decodes the tokens `begin .. end - 1` of `rows` to `[rows, H, n, D]` of `dtype`; rotated rows stay rotated.

    Keys get back the mean that was taken off them.
    """
    codec = encoded.codec
    if encoded.mean is not None:
        taken_off = encoded.mean.of_rows(rows).turned(begin, end)
        if codec.is_rotated:
            taken_off = rotate_states(taken_off)
        rest = decode_stretch(encoded._replace(mean=None), layout, rows, begin, end, torch.float32)
        return rest.add_(taken_off).to(dtype)
    if codec.numbers is None:
        return codec.decode(layout.read(encoded.planes, begin, end, rows), encoded.head_dim, dtype)
    numbers, scale, low = read_stretch(encoded, layout, rows, begin, end)
    assert scale is not None
    if low is None and dtype == torch.bfloat16:
        # Both factors are exact in bfloat16: rounded once, as the codec does.
        states = numbers.to(dtype).mul_(scale[..., None].to(dtype))
    else:
        states = numbers * scale[..., None]
        states = (states if low is None else states.add_(low[..., None])).to(dtype)
    return states.unflatten(0, (-1, encoded.planes[0].shape[1]))


def rotated_back(attended: Attended, codec: Codec, dtype: torch.dtype) -> Attended:
    """Rotates back the output of attention to values that a codec has rotated, and casts it to `dtype`."""
    out = rotate_states(attended.out.float()) if codec.is_rotated else attended.out
    return Attended(out.to(dtype), attended.lse)
