"""`Backend`: which kernels a kind of device has, and what each of them takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hfkv.codecs import Codec


class Kernel(NamedTuple):
    """A kernel, or none.

    Attributes:
        name: as `hfkv doctor` shows it.
        reason: why this one.
        run: called as `attention_naive`, `latent_attention_naive` or `append_naive` are; None where torch's own
            operations do the work.
        reads_device_lengths: whether it takes lengths from the device (`DeviceInputs`), as a CUDA graph needs it.
    """

    name: str
    reason: str
    run: Callable[..., Any] | None
    reads_device_lengths: bool = False


class Asked(NamedTuple):
    """What is to be read or written.

    Attributes:
        codec: codec of the tokens.
        dtype: dtype of queries or new tokens.
        device: where everything is.
        num_queries: q, of each row; from `hfkv.kernels.many.MANY` on all are the same.
        head_dims: Dk and Dv, or r and dr of latents.
    """

    codec: Codec
    dtype: torch.dtype
    device: torch.device
    num_queries: int
    head_dims: tuple[int, int]


class Backend(ABC):
    """The kernels of one kind of device. Each method names a kernel, or says why there is none (`run` is None)."""

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether it is for tensors on `device` at all."""

    @abstractmethod
    def attention(self, asked: Asked) -> Kernel:
        """What queries attend to keys and values by."""

    def latent(self, asked: Asked) -> Kernel:
        """What absorbed queries attend to latents by."""
        return Kernel("decode + absorbed", "this backend has no kernel for latents", None)

    def expanded(self, dtype: torch.dtype) -> Kernel:
        """What queries attend to latents by that are expanded on the way; called with `expand` besides."""
        return Kernel("expand + sdpa", "this backend expands no latents", None)

    def append(self, asked: Asked) -> Kernel:
        """What encodes new tokens and writes them."""
        return Kernel("torch", "this backend encodes and writes with torch's own operations", None)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
