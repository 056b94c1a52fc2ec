"""`encode`: the planes of new tokens of their own, by the kernel that writes others behind those held."""

from __future__ import annotations

import functools

import torch

from hfkv.codecs import Codec, Codecs, Planes
from hfkv.kernels.dispatch import append_kernel
from hfkv.kernels.inputs import Encoded
from hfkv.stores.layout import Layout


def encode(codecs: Codecs, keys: torch.Tensor, values: torch.Tensor) -> Planes:
    """Encodes tokens of one layer, to the bits of ``codecs.encode``.

    A CPU's kernels write the codes of a prompt in one pass; elsewhere, and where something looks at torch's
    operations, these do it.

    Args:
        codecs: the codecs of keys and values.
        keys, values: tokens `[B, H, n, D]`, on one device.

    Returns:
        The planes of the keys and, behind them, of the values.
    """
    kernel = append_kernel(codecs.name, keys.dtype, keys.device, (keys.shape[3], values.shape[3])).run
    if kernel is None or keys.device.type != "cpu" or _is_looked_at():
        return codecs.encode(keys, values)
    parts = (codecs.key, keys), (codecs.value, values)
    sides = [Encoded(codec, _room_for(codec, states), states.shape[3]) for codec, states in parts]
    kernel(keys, values, *sides, Layout(0))
    return sides[0].planes + sides[1].planes


def _is_looked_at() -> bool:
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_traced or torch._C._len_torch_dispatch_stack() > 0


def _room_for(codec: Codec, states: torch.Tensor) -> Planes:
    kinds = _planes_of(codec, states.shape[3], states.dtype)
    return tuple([states.new_empty(*states.shape[:3], width, dtype=dtype) for width, dtype in kinds])


@functools.cache
def _planes_of(codec: Codec, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
    """The width and the dtype of each plane of tokens `[.., head_dim]`."""
    planes = codec.encode(torch.empty(1, 1, 0, head_dim, dtype=dtype, device="cpu"))
    return tuple((plane.shape[3], plane.dtype) for plane in planes)
