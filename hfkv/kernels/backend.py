"""`Backend`: the kernels that a kind of device has for a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from hfkv.codecs import Codec

# From so many queries on, to decode a stretch costs less than products of digits: measured on 2 cores of an EPYC with
# 16k int8 tokens, 8 kv heads of 128, 4 queries each (16 queries: 48 against 62 ms, 8: 44 against 30). On GPUs a guess.
MANY = 16


class StepCall(Protocol):
    """A kernel whose arguments are worked out, except the places of tensors: each layer of a step has its own."""

    def takes(self, *tensors: Any) -> bool:
        """Whether tensors of the first ones' shapes lie in memory as the first ones do."""

    def run(self, *tensors: Any) -> Any:
        """Does it for tensors that it takes: new keys, new values and planes, or query, planes and scale.

        Args:
            *tensors: new keys, new values and the planes that they go to; or a query, planes and the factor on scores,
                and the layer's `KeyMean.vector` where the first one had a mean.

        Returns:
            None, or the output `[B, q, Hq, D]`.
        """


class Kernel(NamedTuple):
    """A kernel, or the reason why there is none.

    Attributes:
        name: name that `hfkv doctor` shows.
        reason: reason for the choice.
        run: function, called as `attention_naive`, `latent_attention_naive` or `append_naive` are; None where torch's
            own operations do the work.
        reads_device_lengths: whether it takes lengths from the device (`DeviceInputs`), as a CUDA graph needs it.
        reads_moved_windows: whether it attends under a window of ours that has moved; else torch's own operations do.
        worth_from: numbers of keys and values together from which it is faster, for one query a row, than to decode
            all tokens and to call scaled_dot_product_attention.
        worth_from_in_pages: the same of tokens in pages, which have to be gathered first; None where it is no other.
        takes_values_innermost: whether it reads, or writes, values whose tokens lie side by side, as
            `Asked.values_innermost` says; without it, it is not called for such values.
        wants_values_innermost: whether it is the faster for them: stores that are made for it then keep values so.
        of_step: called with the arguments of `run` and with `inputs`, gives a `StepCall` for the layers that do the
            same in a forward, or None where these arguments are for `run` alone; None where there is no such thing.
        takes_pairs: whether keys and values may be of two codecs, as `Asked.value_codec` says; without it, it is not
            called for such tokens.
        takes_means: whether keys may have been written less their mean, as `hfkv.kernels.inputs.Encoded.mean` says;
            without it, it is not called for such tokens.
    """

    name: str
    reason: str
    run: Callable[..., Any] | None
    reads_device_lengths: bool = False
    reads_moved_windows: bool = True
    worth_from: float = 0
    worth_from_in_pages: float | None = None
    takes_values_innermost: bool = False
    wants_values_innermost: bool = False
    of_step: Callable[..., StepCall | None] | None = None
    takes_pairs: bool = False
    takes_means: bool = False


class Asked(NamedTuple):
    """The tokens that a kernel is asked to read or write.

    Attributes:
        codec: codec of the tokens, or of their keys (or latents) alone.
        dtype: dtype of queries or new tokens.
        device: device of all tensors.
        num_queries: number of queries of each row, q; from `MANY` on all are the same.
        head_dims: widths Dk and Dv, or r and dr of latents.
        values_innermost: whether the tokens of the values' data lie side by side, and not the numbers of a token: the
            strides of the plane say so. Keys and scales never lie so.
        value_codec: codec of the values (or rotary keys) where it is another than that of the keys, else None.
    """

    codec: Codec
    dtype: torch.dtype
    device: torch.device
    num_queries: int
    head_dims: tuple[int, int]
    values_innermost: bool = False
    value_codec: Codec | None = None

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """The codecs of keys and of values."""
        return self.codec, self.value_codec or self.codec

    @property
    def is_plain(self) -> bool:
        """Whether neither codec loses anything."""
        return all(codec.is_lossless for codec in self.codecs)


class Backend(ABC):
    """The kernels of one kind of device. Each method names a kernel, or says why there is none (`run` is None)."""

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether the backend is for tensors on `device` at all."""

    @abstractmethod
    def attention(self, asked: Asked) -> Kernel:
        """The kernel by which queries attend to keys and values."""

    def latent(self, asked: Asked) -> Kernel:
        """The kernel by which absorbed queries attend to latents."""
        return Kernel("decode + absorbed", "this backend has no kernel for latents", None)

    def expanded(self, dtype: torch.dtype) -> Kernel:
        """The kernel by which queries attend to latents that it expands; called with `expand` besides."""
        return Kernel("expand + sdpa", "this backend expands no latents", None)

    def append(self, asked: Asked) -> Kernel:
        """The kernel that encodes new tokens and writes them."""
        return Kernel("torch", "this backend encodes and writes with torch's own operations", None)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
