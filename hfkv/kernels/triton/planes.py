"""Encoded planes as Triton kernels take them."""

from __future__ import annotations

import torch


def plane_arguments(planes: list[torch.Tensor], *, has_heads: bool = True) -> tuple[torch.Tensor | int, ...]:
    """Gives data and scales of encoded planes, each with the strides of its rows (or pages), heads and tokens.

    Args:
        planes: of keys or of values, as a codec wrote them.
        has_heads: whether the kernel asks for the heads' stride; there is one head otherwise.
    """
    strides = slice(0, 3, 1 if has_heads else 2)
    # 8-bit floats go as bytes, which loads and stores can mask.
    data = planes[0].view(torch.uint8) if planes[0].dtype == torch.float8_e4m3fn else planes[0]
    # Without scales their place is taken by the data.
    scale = planes[-1]
    return data, *data.stride()[strides], scale, *scale.stride()[strides]
