"""`Slots`: what stays when tokens leave the window, at the front of a layer's store: sinks, then summaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfkv.policy.window import Window

NOWHERE = -1


@dataclass(frozen=True)
class Slots:
    """The `window.num_slots` first tokens of a store, while below `gone_below` no query to come sees a token.

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
        """Whether every row's sinks are here."""
        return self.held_from >= max(self.pads, default=0) + self.window.sinks

    @property
    def are_empty(self) -> bool:
        """Whether no slot of any row is filled."""
        least = min(self.pads, default=0)  # of no rows at all nothing is filled
        return self.held_from <= least and self.num_pages(least) == 0

    def num_pages(self, pad: int) -> int:
        """How many pages of a row have been summarised, those since replaced included."""
        if self.window.summary is None:
            return 0
        return max(self.gone_below - pad, 0) // self.window.summary_page_size

    def sink_positions(self, device: torch.device) -> torch.Tensor:
        """The position of each sink slot, int64 `[B, sinks]`; -1 where it is not filled."""
        filled = self._sinks(device)
        return torch.where(filled < self.held_from, filled, NOWHERE)

    def sinks_leaving(self, held_from: int, device: torch.device) -> torch.Tensor | None:
        """Where, counted from the first slot, each sink slot's token is when tokens below `held_from` are to leave.

        Returns:
            int64 `[B, sinks]`, or None where no sink leaves.
        """
        sinks = self.window.sinks
        if not any(pad < held_from and pad + sinks > self.held_from for pad in self.pads):
            return None
        positions = self._sinks(device)
        leaves = (positions >= self.held_from) & (positions < held_from)
        stays = torch.arange(sinks, device=device).expand_as(positions)
        return torch.where(leaves, self.index(positions), stays)

    def pages(self, device: torch.device) -> torch.Tensor:
        """The page whose summary each summary slot holds, int64 `[B, summary_pages]`; -1 where it is not filled."""
        count = self.window.summary_pages
        newest = torch.tensor([self.num_pages(pad) - 1 for pad in self.pads], device=device)[:, None]
        slot = torch.arange(count, device=device)
        return (newest - (newest - slot) % count).clamp_min(NOWHERE)

    def index(self, positions: torch.Tensor) -> torch.Tensor:
        """Where, counted from the first slot, the tokens at `positions` are held."""
        return positions - self.held_from + self.window.num_slots

    def _sinks(self, device: torch.device) -> torch.Tensor:
        return starts(self.pads, device) + torch.arange(self.window.sinks, device=device)


def starts(pads: Sequence[int], device: torch.device) -> torch.Tensor:
    """The position of each row's first real token, int64 `[B, 1]`."""
    return torch.tensor(pads, device=device)[:, None]
