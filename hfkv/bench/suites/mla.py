"""The suite ``mla``: latent attention, one layer of it and steps of a model of a few, against transformers' own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hfkv.bench.contenders import DYNAMIC, Contender, ours_on, peers
from hfkv.bench.lane import Lane
from hfkv.bench.models import build_model, check_room
from hfkv.bench.setting import CROSSOVER, STEP, BenchError, Setting
from hfkv.bench.suite import Cell, Suite
from hfkv.bench.suites.mla_layer import FORMS, LayerLane, LayerTask
from hfkv.bench.suites.prompt import Prompt
from hfkv.bench.suites.step import StepLane, step_turns
from hfkv.bench.tokens import Tokens
from hfkv.bench.turns import LEAST_TURNS, Turns
from hfkv.models.layer_shapes import MLA_SHAPES, MLAShape
from hfkv.models.shapes import shape_config

MLA_LAYERS = 4  # of the model of the part step
# Of the model of one layer, whose MLP is not run.
NO_MLP = 64
# Calls of a cache that grows besides the timed ones: the check's and the warm-up's.
SPARE_CALLS = 8
# Many tokens, and steps of whole models, take long: fewer turns are waited for.
LEAST_LONG_TURNS = 3


class LatentTokens(Tokens):
    """Random latents `[B, 1, T, r]` and rotary keys `[B, 1, T, dr]`, as transformers caches them as keys and values."""

    def __init__(
        self, batch: int, count: int, shape: MLAShape, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.count = count
        generator = torch.Generator(device).manual_seed(seed)
        self.keys, self.values = (
            torch.randn(batch, 1, count, size, dtype=dtype, device=device, generator=generator)
            for size in (shape.kv_lora_rank, shape.qk_rope_head_dim)
        )


class MLASuite(Suite):
    """The suite; models are built when they are first asked for."""

    graphs_are_in = "the part step"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.model is None and setting.shape not in MLA_SHAPES:
            allowed = f"{', '.join(MLA_SHAPES)}, or a model of your own"
            raise BenchError(f"the suite mla has no shape {setting.shape!r}; allowed: {allowed}")
        own = None if setting.model is None else MLAShape.of(shape_config(None, setting.model))
        self.shape = own or MLA_SHAPES[str(setting.shape)]
        self.model_layers = self.shape.num_hidden_layers
        self.num_layers = setting.layers or MLA_LAYERS
        config = self.shape.config(1)
        self.contenders = [*peers((DYNAMIC,), config, self.device), *ours_on(setting.kvs, config)]
        self.forms = [*self.contenders[:1], *(replace(*ours_on(["none"], config), name=n) for n in ("none", *FORMS))]
        self.cells = [Cell(case.context, self.num_layers if case.part == STEP else 1, case) for case in setting.cases]

    @functools.cached_property
    def layer(self) -> PreTrainedModel:
        """The model of one layer, whose MLP is as small as it can be."""
        config = self.shape._replace(intermediate_size=NO_MLP).config(1)
        return build_model(config, self.dtype, self.device, self.setting.seed, 1)

    @functools.cached_property
    def whole(self) -> PreTrainedModel:
        """The model of the part step."""
        config = self.shape.config(self.num_layers)
        return build_model(config, self.dtype, self.device, self.setting.seed, self.setting.layers)

    def contenders_of(self, cell: Cell) -> list[Contender]:
        """Caches, or the forms of the part crossover."""
        return self.forms if cell.case.part == CROSSOVER else self.contenders

    def has_graphs(self, cell: Cell) -> bool:
        return cell.case.part == STEP

    def turns(self, cell: Cell) -> Turns:
        if cell.case.part == STEP:
            return step_turns(self.setting, LEAST_LONG_TURNS)
        return replace(super().turns(cell), least=LEAST_LONG_TURNS if cell.case.new > 1 else LEAST_TURNS)

    def cache_bytes(self, cell: Cell) -> int:
        return cell.layers * self.batch * cell.context * self.shape.token_bytes(self.dtype)

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Models over the same weights, with caches of the same latents."""
        case, seed, turns = cell.case, self.setting.seed, self.turns(cell).room
        self._check_memory(cell)
        latents = LatentTokens(self.batch, case.held, self.shape, self.dtype, self.device, seed)
        if case.part == STEP:
            prompt = Prompt.draw(self.whole, (case.held + 1,) * self.batch, seed)
            return lambda contender: StepLane(contender, prompt, latents, turns)
        task = LayerTask(self.layer, latents, case, self.batch, seed)
        room = case.held + case.new * (turns + SPARE_CALLS if case.new == 1 else 1)
        return lambda contender: LayerLane(contender, task, room)

    def _check_memory(self, cell: Cell) -> None:
        """Transformers' expansion of all tokens, which takes more than any cache, and that of a row in fp32."""
        tokens = cell.case.held + cell.case.new
        caches = (cell.layers + 1) * self.batch * tokens * self.shape.token_bytes(self.dtype)
        expanded = self.batch * tokens * self.shape.expanded_bytes(self.dtype)
        check_room(
            f"{self.batch} × {tokens:,} tokens of all heads, where latents are expanded,",
            max(caches + expanded, tokens * self.shape.expanded_bytes(torch.float32)),
            self.device,
            "take fewer --tokens or a smaller --batch",
        )
