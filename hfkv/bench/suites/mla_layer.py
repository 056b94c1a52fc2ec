"""One layer of latent attention for the suite ``mla``: its calls, lanes and check."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from hfkv.attention.latent import crossover
from hfkv.bench.gate import FACTOR, SLACK, Errors, largest_error, what_is_wrong
from hfkv.bench.lane import Lane
from hfkv.bench.models import model_of
from hfkv.bench.setting import Case
from hfkv.bench.tokens import Tokens, held_bytes
from hfkv.measure.timing import milliseconds, queued_milliseconds

if TYPE_CHECKING:
    from hfkv.attention.latent.crossover import Form

FORMS: tuple[Form, ...] = ("absorbed", "expanded")
# Caches that a contender decodes with in turn on a CPU: together they are more than its own caches hold.
DECODE_LAYERS = 4


class _Given:
    """A cache whose one layer holds what it is given, whatever is put into it: that of one new token included."""

    def __init__(self, *held: torch.Tensor) -> None:
        self.held = held

    def update(self, *new: Any, **given: Any) -> tuple[torch.Tensor, ...]:
        return self.held


def attention_of(model: PreTrainedModel) -> Any:
    """The attention module of the first layer."""
    decoder: Any = model.base_model
    return decoder.layers[0].self_attn


def layer_call(model: PreTrainedModel, hidden: torch.Tensor, seen: int, cache: Any) -> Callable[[], torch.Tensor]:
    """What calls a model's first attention layer with `[B, q, hidden]` behind tokens seen, its mask made before."""
    decoder: Any = model.base_model
    module = attention_of(model)
    positions = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None if isinstance(cache, _Given) else cache,
        position_ids=positions,
    )
    given = {"position_embeddings": decoder.rotary_emb(hidden, positions), "attention_mask": mask}
    return lambda: module(hidden, **given, past_key_values=cache, position_ids=positions)[0]


class LayerTask:
    """What all contenders of a case share: an unpatched model of one layer, and what it reads and holds, if anything.

    Attributes:
        stock: the largest error of DynamicCache's output, once it has been checked; it is the first. None till then.
    """

    def __init__(self, model: PreTrainedModel, latents: Tokens, case: Case, batch: int, seed: int) -> None:
        self.model = model
        self.latents = latents
        self.case = case
        generator = torch.Generator(model.device).manual_seed(seed + 1)
        size = (batch, case.new, model.config.hidden_size)
        self.hidden = torch.randn(size, dtype=model.dtype, device=model.device, generator=generator)
        self.stock: float | None = None

    @functools.cached_property
    def standard(self) -> torch.Tensor:
        """The output `[B, q, hidden]` of the same layer in fp32, over the latents before any codec."""
        return self._by_rows(self._in_fp32, self._filled)

    @property
    def allowed(self) -> float:
        """The largest error that may be: by DynamicCache's own, measured a row at a time where it did not run."""
        if self.stock is None:
            self.stock = largest_error(self._by_rows(self.model, self._filled), self.standard)
        return FACTOR * self.stock + SLACK

    def over(self, latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """The output `[B, 1, hidden]` of the same layer in fp32, over these, the new token's own included."""
        return self._by_rows(
            self._in_fp32, lambda row, dtype: _Given(*(states[row : row + 1].to(dtype) for states in (latents, rotary)))
        )

    @functools.cached_property
    def _in_fp32(self) -> PreTrainedModel:
        return copy.deepcopy(self.model).float()

    def _by_rows(self, model: PreTrainedModel, cache_of: Callable[[int, torch.dtype], Any]) -> torch.Tensor:
        """A model's output, a row at a time: transformers expands all tokens of every row."""
        rows = enumerate(self.hidden.to(model.dtype).split(1))
        return torch.cat([layer_call(model, one, self.case.held, cache_of(row, model.dtype))() for row, one in rows])

    def _filled(self, row: int, dtype: torch.dtype) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        if self.case.held:
            cache.update(*(states[row : row + 1].to(dtype) for states in (self.latents.keys, self.latents.values)), 0)
        return cache


@dataclass(eq=False)
class LayerLane(Lane):
    """One contender's layer, over the same weights as everyone's, and its cache with room for so many tokens."""

    task: LayerTask
    room: int

    warm_ups = 2

    def __post_init__(self) -> None:
        self.more: list[Any] = []
        self.model = model_of(self.contender, self.task.model)
        self.forced: Form | None = next((form for form in FORMS if form == self.contender.name), None)
        self._output: torch.Tensor | None = None

    def open(self) -> None:
        """Makes the cache and fills it; a prompt, before which nothing is held, is read."""
        self._fill()
        self._output = None if self.task.case.held else self._call(self.cache)()

    def check(self) -> Errors:
        """The layer's output against fp32."""
        task, kv = self.task, self.contender.kv
        output = self._call(self.cache)() if self._output is None else self._output
        error = largest_error(output, task.standard)
        if kv is None:
            task.stock = error
            return Errors(full=error)
        if task.case.new == 1 and kv.window is None and not kv.is_lossless:
            layer = self.cache.layers[0]
            twin = largest_error(output, task.over(layer.keys, layer.values))
            standard = "fp32 over its own latents, of the largest number"
            return Errors(twin, error, None, what_is_wrong(output, twin, task.allowed, standard))
        allowed = task.allowed if kv.is_lossless else None
        return Errors(full=error, wrong=what_is_wrong(output, error, allowed, "fp32, of the largest number"))

    def turn(self) -> list[float]:
        """Calls, in ms; a cache grows by a token, or is filled anew where many are read at once."""
        device = self.task.hidden.device
        if self.more:
            # As layer after layer of a model, with latents that no processor's cache holds. The first call pays for
            # what the contender before has left behind.
            self._call(self.cache)()
            return [milliseconds(self._call(cache), device) for cache in self.more]
        return [queued_milliseconds(self.work(), device, self.warm_ms)]

    def read_bytes(self) -> int | None:
        """What one new token must read, the cache and the layer's weights; None for many, which are arithmetic."""
        if self.task.case.new > 1:
            return None
        return held_bytes(self.cache, 1) + sum(weight.nbytes for weight in attention_of(self.task.model).parameters())

    def close(self) -> None:
        super().close()
        self._output = None
        self.more = []

    def _fill(self) -> None:
        assert self.contender.new_cache is not None
        is_decode = self.task.case.new == 1 and self.task.hidden.device.type == "cpu"
        caches = [self.contender.new_cache(self.model, self.room) for _ in range(DECODE_LAYERS if is_decode else 1)]
        if self.task.case.held:
            caches = [self.task.latents.fill(cache, 1, self.room) for cache in caches]
        self.cache, *self.more = caches

    def work(self) -> Callable[[], torch.Tensor]:
        """A call with a cache that holds what it should."""
        if self.task.case.new > 1:
            self._fill()
        return self._call(self.cache)

    def _call(self, cache: Any) -> Callable[[], torch.Tensor]:
        call = layer_call(self.model, self.task.hidden, cache.get_seq_length(), cache)

        def run() -> torch.Tensor:
            with contextlib.nullcontext() if self.forced is None else crossover.forced(self.forced):
                return call()

        return run
