"""The choice of the kernels that write and read a layer's tokens, with reasons."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from hfkv.codecs import CODECS
from hfkv.codecs.registry import LISTENERS
from hfkv.kernels.backend import MANY, Asked, Backend, Kernel
from hfkv.kernels.cpu.backend import CPUBackend
from hfkv.kernels.native.backend import NativeBackend
from hfkv.kernels.triton.backend import TritonBackend
from hfkv.policy.codec_pair import sides_of

# The first backend that serves a device and has a kernel is taken.
BACKENDS: list[Backend] = [NativeBackend(), CPUBackend(), TritonBackend()]


def register_backend(backend: Backend) -> None:
    """Registers a backend, which is asked before the others.

    Raises:
        TypeError: it is no instance of `Backend`.
        ValueError: it is registered already.
    """
    if inspect.isclass(backend):
        raise TypeError(f"a backend must be an instance, got the class {backend.__name__}; write {backend.__name__}()")
    if not isinstance(backend, Backend):
        raise TypeError(f"a backend must be an instance of a subclass of hfkv.kernels.backend.Backend, got {backend!r}")
    if any(backend is known for known in BACKENDS):
        raise ValueError(f"this {type(backend).__name__} is registered already; register each backend once")
    BACKENDS.insert(0, backend)
    forget_choices()


def forget_choices() -> None:
    """Forgets all choices, when backends, codecs or the processor have changed."""
    for chosen in (_attention_kernel, _latent_kernel, append_kernel, expanded_kernel):
        chosen.cache_clear()


LISTENERS.append(forget_choices)


def attention_kernel(
    codec: str,
    dtype: torch.dtype,
    device: torch.device,
    num_queries: int,
    head_dims: tuple[int, int],
    values_innermost: bool = False,
    has_mean: bool = False,
) -> Kernel:
    """The kernel by which queries attend to tokens.

    Args:
        codec: name of the tokens' codec, or of those of keys and of values: ``"k:int8+v:int4"``.
        dtype: dtype of the queries.
        device: device of the queries.
        num_queries: number of queries of each row, q.
        head_dims: widths Dk and Dv.
        values_innermost: see `Asked`.
        has_mean: whether a mean was taken off the keys.
    """
    return _attention_kernel(codec, dtype, device, min(num_queries, MANY), head_dims, values_innermost, has_mean)


@functools.cache
def _attention_kernel(codec: str, *asked: Any) -> Kernel:
    return _first("attention", "decode + sdpa", codec, *asked)


def wants_values_innermost(
    codec: str, dtype: torch.dtype, device: torch.device, head_dims: tuple[int, int], has_mean: bool = False
) -> bool:
    """Whether a store should keep the tokens of values side by side, for the kernel that one query attends by.

    Args:
        codec, dtype, device, head_dims, has_mean: see `attention_kernel`.
    """
    return attention_kernel(codec, dtype, device, 1, head_dims, True, has_mean).wants_values_innermost


def latent_kernel(
    codec: str,
    dtype: torch.dtype,
    device: torch.device,
    num_queries: int,
    widths: tuple[int, int],
    values_innermost: bool = False,
) -> Kernel:
    """The kernel by which absorbed queries attend to latents; called as `latent_attention_naive` is.

    Args:
        codec: name of the codec that wrote latents and rotary keys, or of the two: ``"k:int4+v:none"``.
        dtype: dtype of the queries.
        device: device of the queries.
        num_queries: number of queries of each row, q; one kernel takes any number.
        widths: widths r and dr.
        values_innermost: see `Asked`; the values are the rotary keys.
    """
    return _latent_kernel(codec, dtype, device, widths, values_innermost)


@functools.cache
def _latent_kernel(
    codec: str, dtype: torch.dtype, device: torch.device, widths: tuple[int, int], values_innermost: bool
) -> Kernel:
    return _first("latent", "decode + absorbed", codec, dtype, device, 1, widths, values_innermost)


@functools.cache
def append_kernel(
    codec: str, dtype: torch.dtype, device: torch.device, head_dims: tuple[int, int], values_innermost: bool = False
) -> Kernel:
    """The kernel by which new tokens are encoded and written."""
    return _first("append", "torch", codec, dtype, device, 1, head_dims, values_innermost)


@functools.cache
def expanded_kernel(
    dtype: torch.dtype, device: torch.device, values_innermost: bool = False, is_pair: bool = False
) -> Kernel:
    """The kernel by which queries attend to latents that it expands; called with `expand` besides."""
    none = Kernel("expand + sdpa", f"no backend is for {device.type}", None)
    return _taken(_answers("expanded", dtype, device), none, values_innermost, is_pair)


def _first(
    use: str,
    without: str,
    codec: str,
    dtype: torch.dtype,
    device: torch.device,
    num: int,
    head_dims: tuple[int, int],
    values_innermost: bool,
    has_mean: bool = False,
) -> Kernel:
    """The first kernel that a backend has for a use; or none, named `without`, with the last backend's reason."""
    key, value = sides_of(codec)
    for name in (key, value):
        if name not in CODECS:
            return Kernel(without, f"no codec {name!r} is registered; there are {', '.join(CODECS)}", None)
    other = None if key == value else CODECS[value]
    asked = Asked(CODECS[key], dtype, device, num, head_dims, values_innermost, other)
    none = Kernel(without, f"no backend is for {device.type}", None)
    return _taken(_answers(use, asked, device), none, values_innermost, other is not None, has_mean)


def _answers(use: str, asked: Asked | torch.dtype, device: torch.device) -> list[Kernel]:
    """What the backends of a device say.

    Raises:
        TypeError: one of them says nothing.
    """
    found = []
    for backend in BACKENDS:
        if backend.serves(device):
            found.append(getattr(backend, use)(asked))
            if not isinstance(found[-1], Kernel):
                raise TypeError(
                    f"{type(backend).__name__}.{use} must return a Kernel, got {found[-1]!r}; where there is none, "
                    "return Kernel(name, reason, None)"
                )
    return found


def _taken(found: list[Kernel], none: Kernel, values_innermost: bool, is_pair: bool, has_mean: bool = False) -> Kernel:
    """The first that is a kernel, or one for a step, and takes tokens as they are; else why there is none."""
    kernels = [kernel for kernel in found if kernel.run is not None or kernel.of_step is not None]
    of_pairs = [kernel for kernel in kernels if kernel.takes_pairs or not is_pair]
    of_means = [kernel for kernel in of_pairs if kernel.takes_means or not has_mean]
    able = [kernel for kernel in of_means if kernel.takes_values_innermost or not values_innermost]
    if kernels and not able:
        why = "the numbers of a token must lie side by side, and those of values do not"
        if not of_pairs:
            why = "keys and values must be of one codec, and these are of two"
        elif not of_means:
            why = "it knows nothing of a mean that was taken off the keys"
        return Kernel(none.name, f"{kernels[-1].name}: {why}", None)
    return able[0] if able else found[-1] if found else none
