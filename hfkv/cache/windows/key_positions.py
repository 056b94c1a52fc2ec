"""`placed_mean` and `SummaryKeys`: the positions of a layer's keys, for the mean that was taken off them."""

from __future__ import annotations

import torch

from hfkv.cache.windows.slots import Slots
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.placed_mean import PlacedMean


def placed_mean(mean: KeyMean, shift: int, origins: tuple[int, ...], slots: Slots | None) -> PlacedMean:
    """The mean of the keys that a layer holds, with their positions.

    Args:
        mean: the mean.
        shift: position of index 0 behind the slots, padding included.
        origins: token of each row that stands at position 0.
        slots: the slots in front; None without a window.
    """
    shifts = tuple(shift - origin for origin in origins)
    if slots is None or not slots.window.num_slots:
        return PlacedMean(mean, shifts)
    window, starts = slots.window, _starts(slots.pads, origins)
    positions = None
    if window.summary is not None or bool(starts.any()):
        pages = slots.pages(torch.device("cpu")) if window.summary is not None else torch.empty(len(origins), 0)
        sinks = torch.arange(window.sinks).expand(len(origins), -1)
        positions = starts + torch.cat((sinks, _middles(pages, slots)), dim=1).long()
    return PlacedMean(mean, shifts, window.num_slots, positions)


class SummaryKeys:
    """The keys that stand for pages, in the middle of which their mean is turned to.

    Args:
        codecs: codecs of the layer.
        mean: mean of its keys; None where nothing is taken off.
        origins: token of each row that stands at position 0.
        slots: the slots of the layer.
    """

    def __init__(self, codecs: Codecs, mean: KeyMean | None, origins: tuple[int, ...], slots: Slots) -> None:
        self.codecs, self.mean, self.origins, self.slots = codecs, mean, origins, slots

    def encode(self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encodes the keys and values `[B, H, N, D]` of some pages `[B, N]` of each row's text."""
        return self.codecs.encode(keys if self.mean is None else keys - self._turned(pages, keys), values)

    def as_read(
        self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same keys and values as they will be read from their slots."""
        turned = None if self.mean is None else self._turned(pages, keys)
        read = []
        for codec, states, mean in ((self.codecs.key, keys, turned), (self.codecs.value, values, None)):
            planes = codec.encode(states if mean is None else states - mean)
            wide = states.dtype if mean is None else torch.promote_types(states.dtype, torch.float32)
            found = codec.decode(planes, states.shape[3], wide)
            read.append((found if mean is None else found + mean).to(states.dtype))
        return read[0], read[1]

    def _turned(self, pages: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        assert self.mean is not None
        positions = _starts(self.slots.pads, self.origins) + _middles(pages.cpu(), self.slots)
        return self.mean.turned(*self.mean.waves.of(positions, keys.device))


def _starts(pads: tuple[int, ...], origins: tuple[int, ...]) -> torch.Tensor:
    """The position of each row's first real token, int64 `[B, 1]`: 0 as a rule."""
    return (torch.tensor(pads, dtype=torch.long) - torch.tensor(origins, dtype=torch.long))[:, None]


def _middles(pages: torch.Tensor, slots: Slots) -> torch.Tensor:
    size = slots.window.summary_page_size
    return pages * size + size // 2
