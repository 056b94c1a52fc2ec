"""`Slots`: sinks, then summaries, at the front of a layer's store; they stay when tokens leave the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hfkv.policy.window import Window

NOWHERE = -1


@dataclass(frozen=True)
class Slots:
    """The `window.num_slots` first tokens of a store, when no query to come sees a token below `gone_below`.

    Slot i < sinks of a row with `pad` pad tokens is for position ``pad + i`` and is filled once that is below
    `held_from`. The summary of page p, filled once the page is below `gone_below`, is in slot
    ``sinks + p % summary_pages``.
    """

    window: Window
    pads: tuple[int, ...]
    gone_below: int

    @property
    def held_from(self) -> int:
        """The oldest position held behind the slots."""
        return self.window.held_from(self.gone_below)

    @property
    def sinks_filled(self) -> bool:
        """Whether the slots hold every row's sinks."""
        return self.held_from >= max(self.pads, default=0) + self.window.sinks

    @property
    def are_empty(self) -> bool:
        """Whether no slot of any row is filled."""
        least = min(self.pads, default=0)  # of no rows at all nothing is filled
        return self.held_from <= least and self.num_pages(least) == 0

    def num_pages(self, pad: int) -> int:
        """The number of pages of a row that have been summarised, since replaced ones included."""
        if self.window.summary is None:
            return 0
        return max(self.gone_below - pad, 0) // self.window.summary_page_size

    def sink_positions(self, device: torch.device) -> torch.Tensor:
        """The position of each sink slot, int64 `[B, sinks]`; -1 where the slot is not filled."""
        filled = self._sinks(device)
        return torch.where(filled < self.held_from, filled, NOWHERE)

    def sinks_leaving(self, held_from: int, device: torch.device) -> torch.Tensor | None:
        """The index of each sink slot's token, counted from the first slot, before tokens below `held_from` leave.

        Returns:
            Indices int64 `[B, sinks]`, or None where no sink leaves.
        """
        sinks = self.window.sinks
        if not any(pad < held_from and pad + sinks > self.held_from for pad in self.pads):
            return None
        positions = self._sinks(device)
        leaves = (positions >= self.held_from) & (positions < held_from)
        stays = torch.arange(sinks, device=device).expand_as(positions)
        return torch.where(leaves, self.index(positions), stays)

    def stays(self, gone_below: int) -> bool:
        """Whether the slots are the same when no query to come sees a token below `gone_below`."""
        held_from = self.window.held_from(gone_below)
        leaves = any(pad < held_from and pad + self.window.sinks > self.held_from for pad in self.pads)
        after = replace(self, gone_below=gone_below)
        return not leaves and all(after.num_pages(pad) == self.num_pages(pad) for pad in set(self.pads))

    def pages(self, device: torch.device) -> torch.Tensor:
        """The page that each summary slot stands for, int64 `[B, summary_pages]`; -1 where the slot is not filled."""
        count = self.window.summary_pages
        newest = torch.tensor([self.num_pages(pad) - 1 for pad in self.pads], device=device)[:, None]
        slot = torch.arange(count, device=device)
        return (newest - (newest - slot) % count).clamp_min(NOWHERE)

    def index(self, positions: torch.Tensor) -> torch.Tensor:
        """The index of the tokens at `positions`, counted from the first slot."""
        return positions - self.held_from + self.window.num_slots

    def _sinks(self, device: torch.device) -> torch.Tensor:
        return starts(self.pads, device) + torch.arange(self.window.sinks, device=device)


def starts(pads: Sequence[int], device: torch.device) -> torch.Tensor:
    """The position of each row's first real token, int64 `[B, 1]`."""
    return torch.tensor(pads, device=device)[:, None]
