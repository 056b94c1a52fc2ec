"""The suite ``mla``: latent attention, one layer of it and steps of a model of a few, against transformers' own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hfkv.bench.contenders import DYNAMIC, Contender, ours, peers
from hfkv.bench.errors import BenchError
from hfkv.bench.gate import Errors
from hfkv.bench.grid import Grid, Progress, check_fits, result_of
from hfkv.bench.mla_layer import FORMS, LayerLane, LayerTask
from hfkv.bench.mla_setting import CROSSOVER, MLA_LAYERS, STEP, Case, MLASetting
from hfkv.bench.mla_shapes import MLA_SHAPES, LatentTokens, MLAShape
from hfkv.bench.prefill import LEAST_TURNS, Prompt
from hfkv.bench.results import Result, Table
from hfkv.bench.shapes import MOST_SHARE, build_model
from hfkv.bench.step import MOST_TURNS as MOST_STEP_TURNS
from hfkv.bench.step import STEPS_A_TURN, StepLane, StepTask
from hfkv.measure.machine import free_bytes, load
from hfkv.measure.timing import Turns, bus_bandwidth, copy_bandwidth
from hfkv.models.shapes import shape_config

# Of the model of one layer, whose MLP is not run.
NO_MLP = 64
# Calls of a cache that grows besides the timed ones: the check's and the warm-up's.
SPARE_CALLS = 8


def run_mla(setting: MLASetting, command: str = "", on_progress: Progress = lambda what, share: None) -> Result:
    """Measures a setting of the suite ``mla``: `run` of the others.

    Args:
        setting: what to measure.
        command: the command line, for the record.
        on_progress: called with what is running and how much of all is done, 0 to 1.

    Raises:
        BenchError: it does not fit in memory, or names something unknown.
    """
    start, load_before = time.perf_counter(), load()
    device = torch.device(setting.device)
    models = Models(setting)
    tables: list[tuple[CaseGrid, Table]] = []
    with torch.no_grad():
        grids = [CaseGrid(setting, models, case) for case in setting.cases]
        on_progress("measuring the bandwidth", 0.0)
        bandwidths = [copy_bandwidth(device)]
        for index, grid in enumerate(grids):

            def on_share(what: str, share: float, index: int = index, case: Case = grid.case) -> None:
                on_progress(f"{case.part} {case.context:,}: {what}", (index + share) / len(grids))

            tables.append((grid, grid.measure(grid.case.context, on_share)))
            bandwidths.append(copy_bandwidth(device))
    bus = bus_bandwidth(device)
    copy = max(bandwidths)
    compared = [grid.compared(table, copy, bus) for grid, table in tables]
    return result_of(setting, compared, device, models.shape.layers, copy, bus, command, start, load_before)


class Models:
    """The models of a setting, built when they are first asked for.

    Args:
        setting: what to measure.

    Attributes:
        shape: of their layers.

    Raises:
        BenchError: the setting names a shape that is not there, or a model without latent attention.
    """

    def __init__(self, setting: MLASetting) -> None:
        self.setting = setting
        if setting.model is not None:
            self.shape = MLAShape.of(shape_config(None, setting.model))
        elif setting.shape in MLA_SHAPES:
            self.shape = MLA_SHAPES[setting.shape]
        else:
            raise BenchError(
                f"the suite mla has no shape {setting.shape!r}; allowed: {', '.join(MLA_SHAPES)}, or a model of your "
                "own"
            )
        self._built: dict[str, PreTrainedModel] = {}

    @property
    def layer(self) -> PreTrainedModel:
        """Of one layer, whose MLP is as small as it can be."""
        return self._model("layer", replace(self.shape, intermediate=NO_MLP), 1, 1)

    @property
    def whole(self) -> PreTrainedModel:
        """Of as many layers as the part step has."""
        return self._model("whole", self.shape, self.num_layers, self.setting.layers)

    @property
    def num_layers(self) -> int:
        """Of `whole`."""
        return self.setting.layers or MLA_LAYERS

    def _model(self, name: str, shape: MLAShape, num_layers: int, named: int | None) -> PreTrainedModel:
        if name not in self._built:
            setting = self.setting
            dtype: torch.dtype = getattr(torch, setting.dtype)
            config = shape.config(num_layers)
            self._built[name] = build_model(config, dtype, torch.device(setting.device), setting.seed, named)
        return self._built[name]


class CaseGrid(Grid):
    """A case made ready: its contenders and turns.

    Args:
        setting: what to measure.
        models: of the setting.
        case: which of its cases.

    Raises:
        BenchError: a contender is unknown or cannot take part.
    """

    def __init__(self, setting: MLASetting, models: Models, case: Case) -> None:
        self.setting: MLASetting = setting
        self.models = models
        self.case = case
        self.shape = models.shape
        self.device = torch.device(setting.device)
        self.dtype: torch.dtype = getattr(torch, setting.dtype)
        self.batch = setting.batch
        self.model_layers = self.shape.layers
        config = self.shape.config(1)
        own = [ours(kv) for kv in setting.kvs]
        for contender in own:
            check_fits(contender, config)
        if case.part == CROSSOVER:
            own = [replace(ours("none"), name=name) for name in ("none", *FORMS)]
        stock = peers((DYNAMIC,), config, self.device)
        self.contenders = [*stock, *(_for_case(contender, case, self.device) for contender in own)]
        self.turns = Turns(setting.steps, setting.seconds)
        if case.part == STEP:
            count = None if setting.steps is None else -(-setting.steps // STEPS_A_TURN)
            self.turns = Turns(count, setting.seconds, least=LEAST_TURNS, most=MOST_STEP_TURNS)
        elif case.new > 1:
            self.turns = replace(self.turns, least=LEAST_TURNS)

    def _lanes(self, context: int, num_layers: int) -> Callable[[Contender], Any]:
        case, seed = self.case, self.setting.seed
        latents = None
        if case.held:
            latents = LatentTokens(self.batch, case.held, self.shape, self.dtype, self.device, seed)
        if case.part == STEP:
            assert latents is not None
            model = self.models.whole
            task = StepTask(model, latents, Prompt.draw(model, (case.held + 1,) * self.batch, seed).ids)
            return lambda contender: _CheckedStepLane(contender, task, self.turns.room)
        layer = LayerTask(self.models.layer, latents, case, self.batch, seed)
        room = case.held + case.new * (self.turns.room + SPARE_CALLS if case.new == 1 else 1)

        def lane(contender: Contender) -> LayerLane:
            forced = next((form for form in FORMS if form == contender.name), None)
            return LayerLane(contender, layer, room, forced)

        return lane

    def _num_layers(self, context: int) -> int:
        return self.models.num_layers if self.case.part == STEP else 1

    def _cache_bytes(self, context: int, num_layers: int) -> int:
        return num_layers * self.batch * context * self.shape.token_bytes(self.dtype)

    def _check_memory(self, context: int, num_layers: int) -> None:
        """Transformers' expansion of all tokens, which takes more than any cache, and that of a row in fp32."""
        tokens = self.case.held + self.case.new
        expanded = tokens * self.shape.expanded_bytes(self.dtype)
        needed = self._cache_bytes(tokens, num_layers + 1) + self.batch * expanded
        needed = max(needed, tokens * self.shape.expanded_bytes(torch.float32))
        free = free_bytes(self.device)
        if needed > MOST_SHARE * free:
            raise BenchError(
                f"{self.batch} × {tokens:,} tokens of all heads need about {needed / 1e9:.1f} GB where latents are "
                f"expanded, and {self.device} has {free / 1e9:.1f} GB free; take fewer --tokens or a smaller --batch"
            )

    def _context_reason(self, contender: Contender, context: int) -> str | None:
        """None: whoever runs at all runs at every number of tokens."""
        return None


class _CheckedStepLane(StepLane):
    """A `StepLane` beside a DynamicCache that may run out of memory, as it expands all tokens."""

    def check(self) -> Errors:
        """One forward's logits against DynamicCache's."""
        if self.contender.is_ours and self.task.standard is None:
            raise MemoryError("DynamicCache's, whose logits are the standard; take fewer --tokens or a smaller --batch")
        return super().check()


def _for_case(contender: Contender, case: Case, device: torch.device) -> Contender:
    """The contender, with the reason where a part as a whole does not run it."""
    reason = contender.reason
    if contender.kv is not None and contender.kv.reuse is not None:
        reason = "it shares prefixes between calls: see the suite reuse"
    elif contender.graphs and case.part != STEP:
        reason = "CUDA graphs are of whole decode steps: see the part step"
    elif contender.graphs and device.type != "cuda":
        reason = "CUDA graphs need a GPU"
    return replace(contender, reason=reason)
