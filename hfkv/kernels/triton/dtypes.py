"""Dtypes in which Triton kernels multiply."""

from __future__ import annotations

import torch
import triton.language as tl

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
