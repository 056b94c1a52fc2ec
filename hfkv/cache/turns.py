"""`Turns`: the means of the keys of a group's layers, turned to where the new keys of a forward stand."""

from __future__ import annotations

import torch

from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.placed_mean import PlacedMean

# So few tokens have the means of all layers turned at once: each operation takes longer than their numbers do.
_FEW = 16


class Turns:
    """What layers have in common whose means are of one kind (see `KeyMean`) and whose new keys stand alike."""

    def __init__(self) -> None:
        self._places: dict[KeyMean, int] = {}
        self._stacked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._where: object = None
        self._waves: tuple[torch.Tensor, torch.Tensor] | None = None
        self._turned: tuple[torch.Tensor, ...] = ()

    def to(
        self, mean: KeyMean, first: int, count: int, origins: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Turns to the positions of the tokens `first .. first + count - 1`, each row counted from its origin.

        Args:
            mean: the mean of one layer.
            first: index of the first token in the text, padding included.
            count: number of tokens, n.
            origins: token of each row, or of all, that stands at position 0.

        Returns:
            The mean there, float32 `[B or 1, H, n, D]`, or None for more than a few tokens; and the cosines and sines
            of these positions, float32 `[B or 1, n, D]` each.
        """
        place = self._places.get(mean)
        if place is None:
            place = self._places[mean] = len(self._places)
            self._stacked = self._where = None
        where = first, count, origins
        if self._waves is None or self._where != where:
            placed = PlacedMean(mean, tuple([first - origin for origin in origins]))
            self._waves, self._where = placed.waves(0, count), where
            self._turned = self._all_turned(*self._waves) if count <= _FEW else ()
        return (self._turned[place] if self._turned else None, *self._waves)

    def _all_turned(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._stacked is None:
            with torch.inference_mode(False), torch.no_grad():
                vectors, across = (
                    torch.stack([getattr(mean, name) for mean in self._places]) for name in ("vector", "across")
                )
            self._stacked = vectors[:, None, :, None], across[:, None, :, None]
        vectors, across = self._stacked
        return (vectors * cos[:, None] + across * sin[:, None]).unbind()
