"""Which kernels a layer's tokens are written and read by, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.expanded import expanded_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.cpu.latent import latent_attention
from hfkv.kernels.merge import Attended
from hfkv.kernels.triton.support import unsupported, unsupported_latent

# From so many queries on, to decode a stretch costs less than products of digits: measured on 2 cores of an EPYC with
# 16k int8 tokens, 8 kv heads of 128, 4 queries each (16 queries: 48 against 62 ms, 8: 44 against 30). On GPUs a guess.
MANY = 16


class Kernel(NamedTuple):
    """A kernel, or none.

    Attributes:
        name: as `hfkv doctor` shows it.
        reason: why this one.
        run: called as `attention_naive` or `append_naive` are; None where torch's own operations do the work.
    """

    name: str
    reason: str
    run: Callable[..., Attended] | None


class Append(NamedTuple):
    """As `Kernel`, for `append`."""

    name: str
    reason: str
    run: Callable[..., None] | None


def attention_kernel(
    codec: str, dtype: torch.dtype, device: torch.device, num_queries: int, head_dims: tuple[int, int]
) -> Kernel:
    """The kernel by which queries attend to tokens.

    Args:
        codec: of the tokens: ``"none"``, ``"int8"``, ``"int4"`` or ``"fp8"``.
        dtype: of the queries.
        device: where they are.
        num_queries: q, of each row.
        head_dims: Dk and Dv.
    """
    return _attention_kernel(codec, dtype, device, min(num_queries, MANY), head_dims)


@functools.cache
def _attention_kernel(
    codec: str, dtype: torch.dtype, device: torch.device, num_queries: int, head_dims: tuple[int, int]
) -> Kernel:
    if device.type == "cpu":
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Kernel("decode + sdpa", f"no CPU kernel computes in {_name(dtype)}", None)
        if codec == "none":
            return Kernel(
                "cpu flash", "plain tokens are read where they lie, once for all of a kv head", flash_attention
            )
        if num_queries >= MANY:
            return Kernel(
                "cpu flash", f"{MANY} queries or more: tokens are decoded a stretch at a time", flash_attention
            )
        if codec != "fp8" and not is_exact():
            return Kernel("cpu flash", "this processor has no exact int8 product: tokens are decoded", flash_attention)
        numbers = "float32 products of stretches" if codec == "fp8" else "int8 products read the tokens' own bytes"
        return Kernel("cpu decode", f"fewer than {MANY} queries: {numbers}", decode_attention)
    reason = unsupported(device, dtype, (codec,), head_dims)
    if reason is not None:
        return Kernel("decode + sdpa", reason, None)
    if num_queries < MANY:
        from hfkv.kernels.triton import decode as triton_decode

        few = f"fewer than {MANY} queries: split over the tokens' own bytes"
        return Kernel("triton decode", few, triton_decode.decode_attention)
    from hfkv.kernels.triton import prefill as triton_prefill

    return Kernel(
        "triton prefill", f"{MANY} queries or more: tiles of the tokens' own bytes", triton_prefill.prefill_attention
    )


def latent_kernel(
    codec: str, dtype: torch.dtype, device: torch.device, num_queries: int, widths: tuple[int, int]
) -> Kernel:
    """The kernel by which absorbed queries attend to latents; called as `latent_attention_naive` is.

    Args:
        codec: of latents and rotary keys.
        dtype: of the queries.
        device: where they are.
        num_queries: q, of each row; one kernel does any.
        widths: r and dr.
    """
    return _latent_kernel(codec, dtype, device, widths)


@functools.cache
def _latent_kernel(codec: str, dtype: torch.dtype, device: torch.device, widths: tuple[int, int]) -> Kernel:
    if device.type == "cpu":
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Kernel("decode + absorbed", f"no CPU kernel computes in {_name(dtype)}", None)
        return Kernel("cpu latent", "absorbed queries read the latents' own bytes once for all heads", latent_attention)
    reason = unsupported_latent(device, dtype, codec, *widths)
    if reason is not None:
        return Kernel("decode + absorbed", reason, None)
    from hfkv.kernels.triton import latent as triton_latent

    return Kernel(
        "triton latent", "absorbed queries, split over the latents' own bytes", triton_latent.latent_attention
    )


@functools.cache
def expanded_kernel(dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel by which queries attend to latents that it expands; called with `expand` besides."""
    if device.type != "cpu":
        return Kernel("expand + sdpa", "scaled_dot_product_attention is the faster flash attention there", None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Kernel("expand + sdpa", f"no CPU kernel computes in {_name(dtype)}", None)
    return Kernel("cpu expanded", "many queries: latents are expanded, a stretch at a time", expanded_attention)


@functools.cache
def append_kernel(codec: str, dtype: torch.dtype, device: torch.device, head_dims: tuple[int, int]) -> Append:
    """The kernel by which new tokens are encoded and written."""
    if device.type == "cpu":
        return Append("torch", "a CPU encodes and writes with torch's own operations", None)
    reason = unsupported(device, dtype, (codec,), head_dims)
    # What is encoded is no tile of a product: rows may be as wide as latents.
    if reason is not None and unsupported_latent(device, dtype, codec, *head_dims) is not None:
        return Append("torch", reason, None)
    from hfkv.kernels.triton import append as triton_append

    return Append("triton append", "encoded and written in one pass", triton_append.append)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
