"""`Assignment`: keys and values that are assigned to a layer, one after the other."""

from __future__ import annotations

import torch

from hfkv.held import HeldTokens, Part


class Assignment:
    """Waits for the other half; encoder-decoders assign ``layer.keys`` and then ``layer.values``."""

    def __init__(self) -> None:
        self.waiting: dict[Part, torch.Tensor] = {}

    def take(
        self, part: Part, states: torch.Tensor, held: HeldTokens | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values to hold from now on, once both are there; the other half of `held` where it still fits.

        Args:
            part: which half this is.
            states: `[B, H, T, D]`.
            held: what the layer shows so far, or None.

        Raises:
            ValueError: the halves differ in batch or tokens, or the positions of the tokens are unknown.
        """
        self.waiting[part] = states
        other: Part = "value" if part == "key" else "key"
        count = None if held is None else held.last - held.first
        if held is not None and other not in self.waiting and (states.shape[0], states.shape[2]) == (held.batch, count):
            self.waiting[other] = held.decode(other)
        if other not in self.waiting:
            return None
        keys, values = self.waiting.pop("key"), self.waiting.pop("value")
        if (keys.shape[0], keys.shape[2]) != (values.shape[0], values.shape[2]):
            raise ValueError(
                f"the keys {tuple(keys.shape)} and values {tuple(values.shape)} assigned to this layer differ in batch "
                "or tokens"
            )
        if held is not None and held.gone_below and keys.shape[2] != count:
            raise ValueError(
                f"this layer holds {count} of {held.seen} tokens seen and was assigned {keys.shape[2]}: their "
                "positions are unknown. Assign as many as it holds, or call reset() first"
            )
        return keys, values

    def check_complete(self) -> None:
        """Raises RuntimeError where only one half has been assigned."""
        if self.waiting:
            raise RuntimeError(f"{next(iter(self.waiting))}s were assigned to this layer without the other half")
