"""Support: whether the Triton kernels can be used, asked before anything imports Triton."""

from __future__ import annotations

import functools
import importlib.util

import torch

from hfkv.kernels.inputs import Scoring

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_CODECS = ("none", "int8", "int4", "fp8", "int3", "int2")
# Whose rows stay rotated when they are read.
ROTATED = ("int4", "int3", "int2")
# Tiles of wider heads do not fit the shared memory of a multiprocessor.
MAX_HEAD_DIM = 256
# Of latents, which are loaded once for both products, and of the rotary keys beside them.
MAX_LATENT_DIM, MAX_ROTARY_DIM = 512, 256


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def unsupported(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    codecs: tuple[str, ...] = (),
    head_dims: tuple[int, ...] = (),
    scoring: Scoring | None = None,
) -> str | None:
    """Says why the Triton kernels cannot be used, in words for a user, or None where they can.

    Args:
        device: where queries and planes are.
        dtype: dtype of queries and new tokens.
        codecs: codecs of keys and values.
        head_dims: widths of keys and values.
        scoring: what becomes of scores; None for `append`.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Triton kernels run on NVIDIA GPUs, and these tensors are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if dtype not in DTYPES:
        return f"Triton kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
    if capability < (8, 0):
        return f"Triton kernels need compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    unknown = [codec for codec in codecs if codec not in TRITON_CODECS]
    if unknown:
        return f"Triton kernels read {', '.join(TRITON_CODECS)}, not {unknown[0]}"
    if "fp8" in codecs and capability < (8, 9):
        return f"8-bit floats need compute capability 8.9, and this GPU has {capability[0]}.{capability[1]}"
    if 0 in head_dims:
        return "Triton kernels take no rows of zero dimensions (rotary keys of a model without positions)"
    if any(head_dim > MAX_HEAD_DIM for head_dim in head_dims):
        return f"Triton kernels take heads of up to {MAX_HEAD_DIM} dimensions, not {max(head_dims)}"
    return None if scoring is None else unsupported_scoring(scoring)


def unsupported_latent(
    device: torch.device,
    dtype: torch.dtype,
    codecs: tuple[str, ...],
    latent_dim: int,
    rotary_dim: int,
    scoring: Scoring | None = None,
) -> str | None:
    """Says what `unsupported` says, of attention to latents and of appending them.

    Args:
        device: where queries and planes are.
        dtype: dtype of queries and new tokens.
        codecs: codecs of latents and rotary keys.
        latent_dim, rotary_dim: r and dr.
        scoring: what becomes of scores; None for `append`.
    """
    if latent_dim > MAX_LATENT_DIM or rotary_dim > MAX_ROTARY_DIM:
        most = f"{MAX_LATENT_DIM} and {MAX_ROTARY_DIM}"
        widths = f"{latent_dim} and {rotary_dim}"
        reason = f"Triton kernels take latents and rotary keys of up to {most} dimensions, not {widths}"
        return unsupported(device, dtype, codecs) or reason
    return unsupported(device, dtype, codecs, (rotary_dim,), scoring=scoring)


def unsupported_scoring(scoring: Scoring) -> str | None:
    """Says why the kernels cannot do what is to become of scores, or None where they can."""
    if scoring.weights:
        return "kernels do not give the attention weights"
    if scoring.dropout:
        return "kernels do not drop weights (dropout)"
    return None
