"""`Suite`: a setting made ready, its `Cell`s and who is measured how in each; and what suites of caches share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hfkv.bench.contenders import Contender, ours_on, peers
from hfkv.bench.lane import Lane
from hfkv.bench.models import build_model, check_room
from hfkv.bench.setting import Setting
from hfkv.bench.tokens import Tokens
from hfkv.bench.turns import LEAST_TURNS, Turns
from hfkv.models.shapes import Heads, shape_config, with_layers

# A step works on copies besides the caches themselves: of one layer, in fp32.
WORKING_COPIES = 4


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

    Raises:
        BenchError: it names something unknown, or does not fit in memory.
    """

    contenders: list[Contender]
    cells: list[Cell]
    model_layers = 1
    peak: float | None = None
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


class CacheSuite(Suite):
    """A suite of caches."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.config = shape_config(setting.shape, setting.model)
        self.model_layers = self.config.num_hidden_layers
        self.heads = Heads.of(self.config)
        self.contenders = [*peers(setting.peers, self.config, self.device), *ours_on(setting.kvs, self.config)]
        contexts = [max(setting.ragged)] if setting.ragged else setting.contexts
        self.cells = [Cell(context, setting.layers or self.num_layers(context)) for context in contexts]

    def num_layers(self, context: int) -> int:
        """Layers that are measured unless the setting says so."""
        return self.model_layers

    def layer_bytes(self, context: int) -> int:
        """Bytes of one layer's uncompressed cache."""
        return self.batch * context * self.heads.token_bytes(self.dtype)

    def cache_bytes(self, cell: Cell) -> int:
        return cell.layers * self.layer_bytes(cell.context)

    def check_memory(self, cell: Cell) -> None:
        """Refuses a cell of which not even one cache would fit, with a `BenchError`."""
        check_room(
            f"{self.batch} × {cell.context:,} tokens in {cell.layers} layers, one cache and its working copies,",
            (cell.layers + 1 + WORKING_COPIES * 4 // self.dtype.itemsize) * self.layer_bytes(cell.context),
            self.device,
            "take a shorter --context, a smaller --batch or fewer --layers",
        )

    def tokens(self, cell: Cell) -> Tokens:
        """What the caches of a cell are filled with, where there is room for it."""
        self.check_memory(cell)
        return Tokens(self.batch, cell.context, self.heads, self.dtype, self.device, self.setting.seed)


class ModelSuite(CacheSuite):
    """A suite of caches in whole models, which is built here."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = self.config if setting.layers is None else with_layers(self.config, setting.layers)
        self.model = build_model(config, self.dtype, self.device, setting.seed, setting.layers)
