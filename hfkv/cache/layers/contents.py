"""`Contents`: everything a layer holds, as values, to be put into another layer or into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hfkv.cache.snapshot import Part, PartShape
from hfkv.stores.base import Planes


@dataclass(frozen=True, eq=False)
class Contents:
    """The contents of a `KVLayer` for B rows.

    Attributes:
        parts: planes that are the keys or the values, and what they decode to.
        device: device on which attention computes; the planes may lie elsewhere.
        slots: planes `[B, H_i, S, d_i]` of a window's slots; None leaves them as they are before anything is dropped.
        tokens: planes `[B, H_i, T, d_i]` of the tokens behind them.
        seen: number of tokens since the start, padding included: T, or more where a window has dropped some.
        gone_below: position below which no query to come sees a token, slots apart.
        pads: number of pad tokens of each row.
        origins: token of each row that stands at position 0; None for the first one.
        mean: float32 `[H, D]`, the mean that was taken off the keys; None where nothing was.
    """

    parts: Mapping[Part, PartShape]
    device: torch.device
    slots: Planes | None
    tokens: Planes
    seen: int
    gone_below: int
    pads: tuple[int, ...]
    origins: tuple[int, ...] | None = None
    mean: torch.Tensor | None = None

    def states(self, part: Part) -> torch.Tensor:
        """An empty tensor `[B, H, 0, D]` in the heads, width and dtype of the keys or values."""
        shape = self.parts[part]
        return torch.empty(len(self.pads), shape.heads, 0, shape.head_dim, dtype=shape.dtype, device=self.device)

    def check_planes(self, planes: Sequence[torch.Tensor], num_slots: int) -> None:
        """Raises ValueError unless the contents go into `planes`."""
        wanted = [(plane.dtype, len(self.pads), plane.shape[1], plane.shape[3]) for plane in planes]
        for name, given in (("slots", self.slots), ("tokens", self.tokens)):
            if given is None:
                continue
            shapes = [(plane.dtype, plane.shape[0], plane.shape[1], plane.shape[3]) for plane in given]
            counts = {plane.shape[2] for plane in given}
            if shapes != wanted or len(counts) != 1 or (name == "slots" and counts != {num_slots}):
                raise ValueError(
                    f"a layer whose planes are {[str(dtype) for dtype, *_ in wanted]} was given {name} of another "
                    f"codec, shape or dtype: {[(str(plane.dtype), tuple(plane.shape)) for plane in given]}"
                )
