"""`KeyMean`: the vector that all keys of a layer have in common, which is taken off before a codec writes them."""

from __future__ import annotations

import hashlib

import torch

from hfkv.codecs.waves import Waves


class KeyMean:
    """The mean key of each kv head of a layer, before its rotation by position.

    Most of a key's energy is one vector m, which all tokens share (57 to 90 % of it in SmolLM2): at position p it is
    turned by R_p. A codec that writes ``k - R_p m`` has less to tell apart; what a score lacks, ``q · R_p m``, needs no
    stored bits.

    Args:
        vector: m, `[H, D]`.
        waves: rotation of the layer's keys.

    Attributes:
        vector: m, float32 `[H, D]`, in one piece.
        across: what `Waves.across` gives of it.
        kind: what means have alike that are turned together: waves, shape and device.
    """

    def __init__(self, vector: torch.Tensor, waves: Waves) -> None:
        self.vector = vector.detach().float().contiguous()
        self.across, self.waves = waves.across(self.vector), waves
        self.kind = waves, self.vector.shape, self.vector.device

    def to(self, device: torch.device) -> KeyMean:
        """The same with its vectors on a device."""
        return self if self.vector.device == device else KeyMean(self.vector.to(device), self.waves)

    def of_heads(self, heads: list[int]) -> KeyMean:
        """The mean of some of the kv heads."""
        return KeyMean(self.vector[heads], self.waves)

    def turned(self, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """R_p m at the positions of cosines and sines `[B or 1, n, D]`: float32 `[B or 1, H, n, D]`."""
        # One operation at a time: a fused one may round a number differently at the end of a row of them.
        return self.vector[:, None] * cos[:, None] + self.across[:, None] * sin[:, None]

    def taken_off(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Keys `[B, H, n, D]` less their mean at the positions of cosines and sines `[B or 1, n, D]`."""
        return (keys - self.turned(cos, sin)).to(keys.dtype)

    def digest(self) -> str:
        """A short text that is another for other means."""
        numbers = self.vector.cpu().numpy().tobytes() + self.waves.inv_freq.numpy().tobytes()
        kind = f"{tuple(self.vector.shape)} {self.waves.interleaved}"
        return hashlib.blake2b(numbers + kind.encode(), digest_size=8).hexdigest()
