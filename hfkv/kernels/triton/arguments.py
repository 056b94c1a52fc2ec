"""Arguments of kernels: planes as they take them, and the dtypes in which they multiply."""

from __future__ import annotations

import torch
import triton.language as tl

from hfkv.kernels.triton.bits.trellis import pairs_of_strings
from hfkv.kernels.triton.support import DTYPES

TL_DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in DTYPES}


def product_dtypes(dtype: torch.dtype, value_codec: str, device: torch.device) -> tuple[torch.dtype, torch.dtype, str]:
    """Gives the dtypes of the two products' factors, for queries of `dtype`, and the precision of the second."""
    if device.type == "cpu":
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        return torch.float32, torch.float32, "ieee"
    if dtype == torch.float16 and value_codec != "none":
        # Weights times scales fall below float16; TF32 has its precision and float32's range.
        return torch.float16, torch.float32, "tf32"
    return dtype, dtype, "ieee"


def plane_arguments(planes: list[torch.Tensor], *, has_heads: bool = True) -> tuple[torch.Tensor | int, ...]:
    """Gives data and scales of encoded planes, each with the strides of its rows (or pages), heads and tokens.

    Data have the stride of a token's numbers as well.

    Args:
        planes: of keys or of values, as a codec wrote them.
        has_heads: whether the kernel asks for the heads' stride; there is one head otherwise.
    """
    strides = slice(0, 3, 1 if has_heads else 2)
    # 8-bit floats go as bytes, which loads and stores can mask.
    data = planes[0].view(torch.uint8) if planes[0].dtype == torch.float8_e4m3fn else planes[0]
    # Without scales their place is taken by the data.
    scale = planes[-1]
    return data, *data.stride()[strides], data.stride(3), scale, *scale.stride()[strides]


def pairs_argument(codecs: tuple[str, str], device: torch.device) -> torch.Tensor | None:
    """Gives the table by which int2 is read, if that is one of the codecs."""
    return pairs_of_strings(device) if "int2" in codecs else None
