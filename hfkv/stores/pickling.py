"""Planes in a pickle: torch writes tensors of its newest dtypes there and cannot read them again; their bits it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Seen with torch 2.13: "type object 'torch.storage.UntypedStorage' has no attribute 'dtype'".
_UNREADABLE = {
    getattr(torch, name)
    for name in (
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("uint16", "uint32", "uint64"),
    )
    if hasattr(torch, name)
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes a number


class Bits(NamedTuple):
    """A plane as integers of the same size."""

    numbers: torch.Tensor
    dtype: torch.dtype


def to_pickle(planes: Sequence[torch.Tensor]) -> list[torch.Tensor | Bits]:
    """Planes as a pickle can hold them: views, nothing is copied."""
    return [
        Bits(plane.view(_BITS[plane.dtype.itemsize]), plane.dtype) if plane.dtype in _UNREADABLE else plane
        for plane in planes
    ]


def from_pickle(planes: Sequence[torch.Tensor | Bits]) -> list[torch.Tensor]:
    """What `to_pickle` was given."""
    return [plane.numbers.view(plane.dtype) if isinstance(plane, Bits) else plane for plane in planes]
