"""`PlacedMean`: the mean that was taken off the keys of a layer, and where its tokens stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hfkv.codecs.key_mean import KeyMean

# Rows whose positions lie farther apart are looked up one by one.
_FAR = 1 << 14


@dataclass(frozen=True, eq=False)
class PlacedMean:
    """The mean that was taken off the keys of a layer, and where its tokens stand.

    The token at index i of a `Layout` stands at position ``shifts[b] + i``, counted from its row's start, or at
    position i where ``i < num_slots`` (attention sinks in their slots). Padding stands at negative positions.

    Attributes:
        mean: the mean.
        shifts: position of index 0 behind the slots, of each row.
        num_slots: number of slots in front of the newest tokens.
        slots: positions of the slots, int64 `[B, num_slots]`, where they are others; else None. Kernels are not called
            for those.
    """

    mean: KeyMean
    shifts: tuple[int, ...]
    num_slots: int = 0
    slots: torch.Tensor | None = None

    def of(self, begin: int) -> PlacedMean:
        """The same of the tokens from index `begin` on, counted from there: all slots are among them, or none."""
        if not begin:
            return self
        return PlacedMean(self.mean, tuple(shift + begin for shift in self.shifts))

    def of_rows(self, rows: slice) -> PlacedMean:
        """The same of some of the rows."""
        return replace(self, shifts=self.shifts[rows], slots=None if self.slots is None else self.slots[rows])

    def turned(self, first: int, last: int) -> torch.Tensor:
        """What was taken off the keys of index `first .. last - 1`, float32 `[B or 1, H, n, D]`."""
        return self.mean.turned(*self.waves(first, last))

    def scores(self, query: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """What the scores of queries `[B, Hq, q, D]` lack, not scaled: float32 `[B, Hq, q, n]`."""
        mean = self.mean
        groups = query.shape[1] // len(mean.vector)
        factors = torch.cat((mean.vector, mean.across), dim=-1).repeat_interleave(groups, dim=0)
        query = query.float()
        waves = torch.cat(self.waves(first, last), dim=-1)
        return torch.cat((query, query), dim=-1) * factors[:, None] @ waves[:, None].transpose(2, 3)

    def waves(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines where the tokens of index `first .. last - 1` stand, float32 `[B or 1, n, D]` each."""
        num_slots, device = self.num_slots, self.mean.vector.device
        if first >= num_slots or first >= last:
            return self._behind_slots(first, last)
        end, waves = min(num_slots, last), self.mean.waves
        if self.slots is None:
            parts = [tuple(wave[None] for wave in waves.at(first, end, device))]
        else:
            parts = [waves.of(self.slots[:, first:end], device)]
        if last > end:
            parts.append(self._behind_slots(end, last))
        rows = max(len(cos) for cos, _ in parts)
        cos, sin = (torch.cat([part[i].expand(rows, -1, -1) for part in parts], dim=1) for i in (0, 1))
        return cos, sin

    def _behind_slots(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = min(self.shifts, default=0), max(self.shifts, default=0)
        if high - low > _FAR + last - first:
            apart = [self.mean.waves.at(first + shift, last + shift, self.mean.vector.device) for shift in self.shifts]
            cos, sin = (torch.stack(waves) for waves in zip(*apart, strict=True))
            return cos, sin
        cos, sin = self.mean.waves.at(first + low, last + high, self.mean.vector.device)
        if low == high:
            return cos[None], sin[None]
        begins = [shift - low for shift in self.shifts]
        cos, sin = (torch.stack([wave[begin : begin + last - first] for begin in begins]) for wave in (cos, sin))
        return cos, sin
