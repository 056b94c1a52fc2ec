"""`HeldTokens`: what a layer held at one moment, the snapshot behind its views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from hfkv.layer import KVLayer

Part = Literal["key", "value"]


@dataclass(frozen=True, eq=False)
class HeldTokens:
    """The tokens of one layer that its views show, by reference: nothing is copied or decoded yet."""

    layer: KVLayer
    version: int
    first: int  # index among the held tokens of the first one the views show
    last: int
    seen: int
    held_from: int

    @property
    def is_windowed(self) -> bool:
        """Whether a window of ours decides what is visible (the model's masks do for its own)."""
        return self.layer.window is not None and not self.layer.is_sliding

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    def shape(self, part: Part) -> tuple[int, int, int, int]:
        heads, head_dim = self.layer._shapes[part]
        return self.layer._batch, heads, self.last - self.first, head_dim

    def layout(self, part: Part) -> tuple[tuple[int, ...], int]:
        """Strides and storage offset of what `decode` returns, or of a contiguous tensor where it is made anew."""
        if self.layer.codec.name != "none" or not self.layer.store.reads_slices:
            _, heads, count, head_dim = self.shape(part)
            return (heads * count * head_dim, count * head_dim, head_dim, 1), 0
        decoded = self.decode(part)
        return decoded.stride(), int(decoded.storage_offset())

    def decode(self, part: Part) -> torch.Tensor:
        """The tokens as plain `[B, H, T, D]`."""
        if self.version != self.layer.version:
            raise RuntimeError("these keys or values are stale: the cache has dropped, reordered or cropped since")
        return self.layer.decode(part, self.first, self.last)

    def positions(self) -> torch.Tensor:
        """The position of every held token, int64 `[T]` on the layer's device."""
        window = self.layer.window
        sinks = min(window.sinks, self.seen) if window else 0
        start = torch.arange(sinks, device=self.device)
        return torch.cat((start, torch.arange(max(self.held_from, sinks), self.seen, device=self.device)))
