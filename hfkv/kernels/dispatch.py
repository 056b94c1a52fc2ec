"""Which kernel attends to a layer's tokens, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.layout import Layout

Attention = Callable[[torch.Tensor, Encoded, Encoded, Layout, Visibility, Scoring], Attended]

# From so many queries on, decoding a stretch costs less than products of digits: 2 cores of an EPYC, 16k tokens in
# int8.
MANY = 16


class Kernel(NamedTuple):
    """A kernel, or none.

    Attributes:
        name: as `hfkv doctor` shows it.
        reason: why this one.
        attend: the kernel; None where a layer is decoded for scaled_dot_product_attention.
    """

    name: str
    reason: str
    attend: Attention | None


def choose(codec: str, dtype: torch.dtype, device: torch.device, num_queries: int) -> Kernel:
    """The kernel for queries of `dtype` on `device` to tokens of `codec`.

    Args:
        codec: ``"none"``, ``"int8"``, ``"int4"`` or ``"fp8"``.
        dtype: of the queries.
        device: where they are.
        num_queries: q, of each row.
    """
    return _choose(codec, dtype, device.type, num_queries > 1, num_queries >= MANY)


@functools.cache
def _choose(codec: str, dtype: torch.dtype, device: str, several: bool, many: bool) -> Kernel:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Kernel("decode + sdpa", f"no kernel computes in {dtype}", None)
    if device == "cpu":
        return _on_cpu(codec, many)
    reason = _no_triton(device)
    if reason is not None:
        return Kernel("decode + sdpa", reason, None)
    if several:
        from hfkv.kernels.triton_prefill import prefill_attention

        return Kernel("triton prefill", "several queries: encoded tiles are decoded on the chip", prefill_attention)
    from hfkv.kernels.triton_decode import decode_attention

    return Kernel("triton decode", "one query: split over the tokens, read in their own bytes", decode_attention)


def _on_cpu(codec: str, many: bool) -> Kernel:
    if codec == "none":
        from hfkv.kernels.cpu_flash import flash_attention

        return Kernel(
            "cpu flash", "plain tokens are read where they lie, once for all queries of a kv head", flash_attention
        )
    if many:
        from hfkv.kernels.cpu_flash import flash_attention

        return Kernel("cpu flash", f"{MANY} queries or more: stretches are decoded for all of them", flash_attention)
    from hfkv.kernels.cpu_decode import decode_attention

    products = "float32" if codec == "fp8" else "int8"
    return Kernel(
        "cpu decode", f"few queries: {products} products read the tokens in their own bytes", decode_attention
    )


@functools.cache
def _no_triton(device: str) -> str | None:
    """Why Triton kernels cannot run on `device`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    support = importlib.import_module("hfkv.kernels.triton_support")
    reason: str | None = support.unsupported(torch.device(device))
    return reason
