"""`Suite`: a setting made ready, its `Cell`s and who is measured how in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hfkv.bench.contenders import Contender
from hfkv.bench.lane import Lane
from hfkv.bench.setting import Setting
from hfkv.bench.turns import LEAST_TURNS, Turns


class Cell(NamedTuple):
    """One table to be measured: its tokens, its layers and, in the suite mla, its `Case`."""

    context: int
    layers: int = 1
    case: Any = None

    def __str__(self) -> str:
        return f"{self.context:,}" if self.case is None else f"{self.case.part} {self.context:,}"


class Suite:
    """A setting made ready.

    Attributes:
        contenders: all who take part or cannot, peers first.
        cells: a table each.
        model_layers: layers of the whole shape.
        peak: operations a second of a large matrix product; None where no floor is of operations.
        is_timed: whether contenders take turns once they are checked.

    Raises:
        BenchError: it names something unknown, or does not fit in memory.
    """

    contenders: list[Contender]
    cells: list[Cell]
    model_layers = 1
    peak: float | None = None
    is_timed = True
    least_turns = LEAST_TURNS
    graphs_are_in = "the suite step"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        self.dtype: torch.dtype = getattr(torch, setting.dtype)
        self.batch = len(setting.ragged) or setting.batch

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """What makes the lane of each contender of a cell; a `BenchError` where it does not fit in memory."""
        raise NotImplementedError

    def contenders_of(self, cell: Cell) -> list[Contender]:
        """All who take part in a cell, or cannot."""
        return self.contenders

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        """Why a contender is not run in a cell, or None."""
        if contender.shares and self.setting.suite != "reuse":
            return "it shares prefixes between calls: see the suite reuse"
        if contender.graphs and not self.has_graphs(cell):
            return f"CUDA graphs are of whole decode steps: see {self.graphs_are_in}"
        if contender.graphs and self.device.type != "cuda":
            return "CUDA graphs need a GPU"
        return contender.reason

    def has_graphs(self, cell: Cell) -> bool:
        """Whether what is timed in a cell is decode steps of whole models."""
        return False

    def turns(self, cell: Cell) -> Turns:
        """How often the contenders of a cell take turns."""
        return Turns(self.setting.steps, self.setting.seconds, self.least_turns, busy=self.setting.busy)

    def cache_bytes(self, cell: Cell) -> int:
        """Bytes of the largest cache of a cell, an uncompressed one; 0 where there are no caches."""
        return 0

    def bases(self, cell: Cell) -> tuple[str, ...]:
        """The peers by whose time the others' is divided, the first that ran; empty for the fastest peer."""
        return ()
