"""`PlacedMean`: the mean that was taken off the keys of a layer, and where its tokens stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hfkv.codecs.key_mean import KeyMean


@dataclass(frozen=True, eq=False)
class PlacedMean:
    """The mean that was taken off the keys of a layer, and where its tokens stand.

    The token at index i of a `Layout` stands at position ``shifts[b] + i``, counted from its row's start, or at
    position i where ``i < num_slots`` (attention sinks in their slots). Padding stands at negative positions.

    Attributes:
        mean: the mean.
        shifts: position of index 0 behind the slots, of each row.
        num_slots: number of slots in front of the newest tokens.
        summaries: positions of the last of the slots, int64 `[B, S]`, where these are summaries of pages; else None.
            Kernels are not called for those.
    """

    mean: KeyMean
    shifts: tuple[int, ...]
    num_slots: int = 0
    summaries: torch.Tensor | None = None

    def of(self, begin: int) -> PlacedMean:
        """The same of the tokens from index `begin` on, counted from there: all slots are among them, or none."""
        if not begin:
            return self
        return PlacedMean(self.mean, tuple(shift + begin for shift in self.shifts))

    def of_rows(self, rows: slice) -> PlacedMean:
        """The same of some of the rows."""
        summaries = None if self.summaries is None else self.summaries[rows]
        return replace(self, shifts=self.shifts[rows], summaries=summaries)

    def turned(self, first: int, last: int) -> torch.Tensor:
        """What was taken off the keys of index `first .. last - 1`, float32 `[B or 1, H, n, D]`."""
        parts, end = [], min(self.num_slots, last)
        if first < end:
            parts.append(self._in_slots(first, end))
        if first < last and last > self.num_slots:
            parts.append(self.mean.turned(*self.waves(max(first, self.num_slots), last)))
        if len({len(part) for part in parts}) > 1:
            parts = [part.expand(len(self.shifts), -1, -1, -1) for part in parts]
        heads, width = self.mean.vector.shape
        return torch.cat(parts, dim=2) if parts else self.mean.vector.new_empty(1, heads, 0, width)

    def waves(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines where the tokens of index `first .. last - 1` stand, behind the slots: `[B or 1, n, D]`."""
        low, high = min(self.shifts, default=0), max(self.shifts, default=0)
        cos, sin = self.mean.waves.at(first + low, last + high, self.mean.vector.device)
        if low == high:
            return cos[None], sin[None]
        begins = [shift - low for shift in self.shifts]
        cos, sin = (torch.stack([wave[begin : begin + last - first] for begin in begins]) for wave in (cos, sin))
        return cos, sin

    def _in_slots(self, first: int, end: int) -> torch.Tensor:
        positions = torch.arange(first, end)[None]
        if self.summaries is not None:
            num_sinks = self.num_slots - self.summaries.shape[1]
            sinks = torch.arange(num_sinks).expand(len(self.summaries), -1)
            positions = torch.cat((sinks, self.summaries.cpu()), dim=1)[:, first:end]
        # One by one: sinks and summaries are few, and a text's summaries may be far apart.
        device, at = self.mean.vector.device, self.mean.waves.at
        rows = [[at(position, position + 1, device) for position in row] for row in positions.tolist()]
        cos, sin = (torch.stack([torch.cat([wave[i] for wave in row]) for row in rows]) for i in (0, 1))
        return self.mean.turned(cos, sin)
