"""Calls of `decode_attention` that take the kernel of digits, and its arguments."""

from __future__ import annotations

import torch

from hfkv.kernels.triton.arguments import pairs_argument
from hfkv.kernels.triton.bits.parts import BITS
from hfkv.kernels.triton.numbers import rotation
from hfkv.kernels.triton.tiling import columns_of, padded

CODECS = ("int8", "int4", "fp8", "int3", "int2")
# Queries of two digits are as exact as these need.
DTYPES = (torch.bfloat16, torch.float16)
# Tokens that are loaded at once.
GROUP = 16


def takes_digits(
    query: torch.Tensor,
    key_planes: list[torch.Tensor],
    value_planes: list[torch.Tensor],
    codecs: tuple[str, str],
    page_size: int,
) -> bool:
    """Says whether the kernel of digits can attend to planes: codes, those of values with the tokens innermost.

    Args:
        query: `[B, Hq, q, D]`.
        key_planes, value_planes: data and scales.
        codecs: codecs of keys and of values.
        page_size: P, or 0 for contiguous planes.
    """
    if query.dtype not in DTYPES or codecs[0] not in CODECS or codecs[1] not in CODECS:
        return False
    values = value_planes[0]
    room = values.shape[2]
    if values.stride(2) != 1 or values.stride(3) < room or room % GROUP or page_size & (page_size - 1):
        return False
    scales = key_planes[1], value_planes[1]
    if codecs[0] in BITS and key_planes[0].stride(2) != key_planes[0].shape[3]:
        return False
    # They are loaded four bytes at a time.
    side_by_side = all(
        scale.stride(3) == 1 and scale.stride(2) == scale.shape[3] and scale.data_ptr() % GROUP == 0 for scale in scales
    )
    strides = (*key_planes[0].stride()[:2], *values.stride()[:2], values.stride(3))
    strides = (*strides, *scales[0].stride()[:2], *scales[1].stride()[:2])
    return side_by_side and all(stride % GROUP == 0 for stride in strides)


def plane_arguments(
    key_planes: list[torch.Tensor], value_planes: list[torch.Tensor], codecs: tuple[str, str]
) -> tuple[torch.Tensor | int | None, ...]:
    """Gives the planes with their strides, and what codes are read by, as the kernel takes them."""
    # 8-bit floats go as bytes.
    k, v = (
        planes[0] if planes[0].dtype == torch.int8 else planes[0].view(torch.uint8)
        for planes in (key_planes, value_planes)
    )
    arguments: list[torch.Tensor | int] = [k, *k.stride()[:3], key_planes[1], *key_planes[1].stride()[:2]]
    arguments += [v, *v.stride()[:2], v.stride(3), value_planes[1], *value_planes[1].stride()[:2]]
    return *arguments, pairs_argument(codecs, k.device)


def constants(
    codecs: tuple[str, str], dims: tuple[int, int], widths: tuple[int, int], device: torch.device
) -> tuple[object, ...]:
    """Gives the kernel's compile-time constants that describe the planes."""
    return (
        *(*codecs, *dims, *widths, padded(dims[0], 32)),
        *(columns_of(codec, dim, width, 32) for codec, dim, width in zip(codecs, dims, widths, strict=True)),
        *(*rotation(dims[0]), device.type == "cuda"),
    )
