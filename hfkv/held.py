"""`HeldTokens`: what a layer held at one moment, the snapshot behind its views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from hfkv.codecs import Codec
from hfkv.stores import Store
from hfkv.window import Window

Part = Literal["key", "value"]


class PartShape(NamedTuple):
    """Which of a store's planes are the keys or the values, and what they decode to."""

    planes: slice
    heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class HeldTokens:
    """The tokens of one layer that its views show, by reference: nothing is copied or decoded yet."""

    store: Store
    codec: Codec
    parts: Mapping[Part, PartShape]
    batch: int
    device: torch.device
    window: Window | None  # ours; None where the model's masks say what is visible
    first: int  # index among the held tokens of the first one the views show
    last: int
    seen: int  # tokens since the start, padding included
    held_from: int  # first position held above the sinks
    version: int  # of the store

    @property
    def is_windowed(self) -> bool:
        """Whether a window of ours decides what is visible."""
        return self.window is not None

    @property
    def is_slice(self) -> bool:
        """Whether `decode` returns a slice of the store's own planes: free, not contiguous, and alive."""
        return self.codec.name == "none" and self.store.reads_slices

    def shape(self, part: Part) -> tuple[int, int, int, int]:
        """`[B, H, T, D]` of the keys or values."""
        return self.batch, self.parts[part].heads, self.last - self.first, self.parts[part].head_dim

    def layout(self, part: Part) -> tuple[tuple[int, ...], int]:
        """Strides and storage offset of what `decode` returns, or of a contiguous tensor where it is made anew."""
        if self.is_slice:
            decoded = self.decode(part)
            return decoded.stride(), int(decoded.storage_offset())
        _, heads, count, head_dim = self.shape(part)
        return (heads * count * head_dim, count * head_dim, head_dim, 1), 0

    def decode(self, part: Part) -> torch.Tensor:
        """The tokens as a plain `[B, H, T, D]`.

        Raises:
            RuntimeError: the store has dropped, reordered or cropped tokens since.
        """
        if self.version != self.store.version:
            raise RuntimeError("these keys or values are stale: the cache has dropped, reordered or cropped since")
        planes = self.store.read(self.parts[part].planes)
        held = tuple(plane[:, :, self.first : self.last] for plane in planes)
        return self.codec.decode(held, self.parts[part].head_dim, self.parts[part].dtype)

    def positions(self) -> torch.Tensor:
        """The position of every held token, int64 `[T]` on the layer's device."""
        sinks = min(self.window.sinks, self.seen) if self.window else 0
        above = range(min(max(self.held_from, sinks), self.seen), self.seen)
        start = torch.arange(sinks, device=self.device)
        return torch.cat((start, torch.arange(above.start, above.stop, device=self.device)))
