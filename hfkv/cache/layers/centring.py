"""`Centred`: takes the mean of a layer's keys off them before they are encoded."""

from __future__ import annotations

import torch

from hfkv.cache.layers.span import Span
from hfkv.cache.snapshot import HeldTokens
from hfkv.cache.step import Member
from hfkv.cache.turns import Turns
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.policy.config import KVConfig

# Tokens whose mean is taken off together: what is made on the way stays small.
_TOGETHER = 4096


class Centred(Member):
    """The mean of a `KVLayer`'s keys, and where its rows begin.

    Attributes:
        mean: what is taken off the keys; None where nothing is.
    """

    kv: KVConfig
    codecs: Codecs
    span: Span
    mean: KeyMean | None

    def take_mean(self, mean: KeyMean | None) -> None:
        """Takes the mean of its keys before the first of them comes, where it gains by one."""
        self.mean = mean if self.gains_by_mean else None

    @property
    def gains_by_mean(self) -> bool:
        """Whether a mean is to be taken off its keys, once there is one."""
        return self.kv.key_mean and self.codecs.key.takes_mean

    def begin_rows(self, origins: tuple[int, ...], began: tuple[int, ...]) -> None:
        """Says which token of each row stands at position 0, and which is the first real one; see `LeftPadding`."""
        self._change()
        self.span.padding.begin(origins, began)

    def _less_mean(self, keys: torch.Tensor) -> torch.Tensor:
        """New keys `[B, H, T, D]` less their mean; those of another shape as they are, since they are refused."""
        assert self.mean is not None
        if self.mean.vector.device != keys.device:
            self.mean = self.mean.to(keys.device)
        mean, first, count, origins = self.mean, self.span.seen, keys.shape[2], self.span.padding.origins or (0,)
        if (keys.shape[1], keys.shape[3]) != mean.vector.shape or len(origins) not in (1, len(keys)):
            return keys
        turns = self.group.turns.get(mean.kind)
        if turns is None:
            turns = self.group.turns[mean.kind] = Turns()
        turned, cos, sin = turns.to(mean, first, count, origins)
        if turned is not None:
            return (keys - turned).to(keys.dtype)
        if keys.requires_grad or count <= _TOGETHER:
            return mean.taken_off(keys, cos, sin)
        out = torch.empty_like(keys)
        for begin in range(0, count, _TOGETHER):
            piece = slice(begin, begin + _TOGETHER)
            out[:, :, piece] = mean.taken_off(keys[:, :, piece], cos[:, piece], sin[:, piece])
        return out

    def _assigned_less_mean(self, keys: torch.Tensor, shown: HeldTokens | None) -> torch.Tensor:
        """Assigned keys less their mean where the tokens `shown` stand, or from position 0 on."""
        assert self.mean is not None
        self.mean = self.mean.to(keys.device)
        first, last, placed = 0, keys.shape[2], PlacedMean(self.mean, (0,))
        if shown is not None and shown.last - shown.first == last and shown.placed_mean is not None:
            first, last, placed = shown.first, shown.last, shown.placed_mean
        waves = placed.waves(first, last)
        return self.mean.taken_off(keys, *waves) if len(waves[0]) in (1, len(keys)) else keys
