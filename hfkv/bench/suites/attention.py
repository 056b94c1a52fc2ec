"""The suite ``attention``: one layer's part of a decode step, the update of its cache and the attention to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfkv.attention.function import NAME
from hfkv.bench.contenders import NO_CACHE, Contender
from hfkv.bench.gate import Errors, attention_errors
from hfkv.bench.lane import Lane
from hfkv.bench.setting import BenchError
from hfkv.bench.suite import CacheSuite, Cell
from hfkv.bench.tokens import Tokens, held_bytes
from hfkv.measure.timing import milliseconds
from hfkv.models.shapes import Heads, skeleton, with_layers

# On an accelerator so many bytes of keys and values take turns, that its L2 (50 to 60 MB) holds none of them even at a
# quarter of the size, and so many layers at least, that launches overlap as in a model.
ROTATED_BYTES, LEAST_ROTATED, MOST_ROTATED = 2**30, 4, 32
# Steps besides the timed ones: the check and the warm-up.
SPARE_STEPS = 8


def attention_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The config of a model of plain layers only, as many as are measured; a `BenchError` where the model has none."""
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    if DynamicLayer not in kinds:
        raise BenchError(f"{config.model_type!r} has no layer of full attention; use the suite step")
    config = with_layers(config, num_layers)
    names = getattr(config, "layer_types", None)
    if names is not None:
        config.layer_types = [names[kinds.index(DynamicLayer) % len(names)]] * num_layers
    return config


class AttentionModule:
    """A model's attention module, to call attention functions as it does; a `BenchError` where it does not run sdpa."""

    def __init__(self, config: PreTrainedConfig) -> None:
        model = skeleton(config)
        implementation = model.config._attn_implementation
        if implementation != "sdpa":
            raise BenchError(
                f"{config.model_type!r} runs the attention {implementation!r}; this suite compares with sdpa. Use the "
                "suite step"
            )
        found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]
        if not found:
            raise BenchError(f"{config.model_type!r} has no attention module like Llama's; use the suite step")
        self.module: Any = found[0].eval()
        self.scale = float(getattr(self.module, "scaling", Heads.of(config).head_dim ** -0.5))

    def __call__(self, name: str, query: torch.Tensor, keys: Any, values: Any, mask: Any = None) -> torch.Tensor:
        """The output `[B, 1, Hq, D]` of the attention function of that name."""
        function = ALL_ATTENTION_FUNCTIONS[name]
        return function(self.module, query, keys, values, mask, dropout=0.0, scaling=self.scale)[0]


@dataclass(eq=False)
class AttentionLane(Lane):
    """One contender's cache of the layers that take turns; what is counted and timed is one of them."""

    config: PreTrainedConfig
    tokens: Tokens
    module: AttentionModule
    steps: int  # it has room for them, and the spare ones

    warm_ups = 2

    def __post_init__(self) -> None:
        self.room = self.tokens.count + self.steps + SPARE_STEPS
        self.step: Callable[[], None] = self._step_layers

    def open(self) -> None:
        assert self.contender.new_cache is not None
        cache = self.contender.new_cache(self.config, self.room)
        self.cache = self.tokens.fill(cache, self.config.num_hidden_layers, self.room)
        if self.contender.is_compiled:
            # As transformers compiles the whole forward of a decode step.
            self.step = torch.compile(self._step_layers, mode="reduce-overhead")

    def check(self) -> Errors:
        """The first layer's attention against fp32, after a step of every layer."""
        output = self._step(0).clone()
        for layer in range(1, self.config.num_hidden_layers):
            self._step(layer)
        return attention_errors(output, self.tokens, self.cache.layers[0], self.module.scale, self.contender.is_ours)

    def work(self) -> Callable[[], object]:
        return self.step

    def turn(self) -> list[float]:
        """One step of every layer, as ms a layer."""
        return [milliseconds(self.step, self.tokens.query.device) / self.config.num_hidden_layers]

    def read_bytes(self) -> int:
        return held_bytes(self.cache, 1)

    def _step(self, layer: int) -> torch.Tensor:
        tokens = self.tokens
        mask = None
        if isinstance(self.cache, StaticCache):
            # Its keys go on behind the text: transformers masks them.
            length = self.cache.layers[layer].get_seq_length() + 1
            mask = (torch.arange(self.room, device=tokens.query.device) < length)[None, None, None]
        keys, values = self.cache.update(tokens.new_key, tokens.new_value, layer)
        return self.module(NAME if self.contender.is_ours else "sdpa", tokens.query, keys, values, mask)

    def _step_layers(self) -> None:
        for layer in range(self.config.num_hidden_layers):
            self._step(layer)


class AttentionSuite(CacheSuite):
    """The suite."""

    lane: type[AttentionLane] = AttentionLane

    def num_layers(self, context: int) -> int:
        """Layers that take turns: one on a CPU, where the other contenders' turns empty its caches."""
        wanted = -(-ROTATED_BYTES // self.layer_bytes(context))
        return 1 if self.device.type == "cpu" else min(max(wanted, LEAST_ROTATED), MOST_ROTATED)

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        if contender.name == NO_CACHE:
            return "without a cache there is nothing to update and nothing held: see the suite step"
        return super().reason(contender, cell)

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """Caches of as many layers as take turns, all with the same tokens."""
        tokens, config = self.tokens(cell), attention_config(self.config, cell.layers)
        module, steps = AttentionModule(config), self.turns(cell).room
        return lambda contender: self.lane(contender, config, tokens, module, steps)
