"""`Planner` and `Fit`: a model to plan for, and what of it fits in a memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from hfkv.models.shapes import SHAPES, shape_config
from hfkv.planning.footprint import PREFILL_CHUNK, Footprint
from hfkv.planning.geometry import Geometry
from hfkv.planning.weights import Weights, planned_weights
from hfkv.policy.config import KVConfig

# Where searches end: no model's context, and no batch, is longer.
MOST_TOKENS, MOST_ROWS = 1 << 24, 1 << 20
# Names on the Hub: with an owner, and old ones without.
_HUB, _OLD_HUB = re.compile(r"^[\w-][\w.-]*/[\w.-]+$"), re.compile(r"^\w[\w.-]*$")
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Planner:
    """A model to plan for.

    Attributes:
        geometry: what the model keeps.
        dtype: the dtype of keys, values and unquantised weights.
        device: a device of the type that is planned for.
        weights: the weights in every precision.
        reply: tokens of each row that come one by one; None for any number.
    """

    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    weights: dict[str, Weights]
    reply: int | None = None

    @classmethod
    def of(cls, source: Any, dtype: torch.dtype | None, device: torch.device, reply: int | None = None) -> Planner:
        """Builds the planner; see `memory_plan` for the arguments."""
        dtype = dtype or getattr(source, "dtype", None)
        if dtype not in _SHORT:
            dtype = torch.bfloat16
        geometry = Geometry.of(source, dtype)
        return cls(geometry, dtype, device, planned_weights(geometry.skeleton, _SHORT[dtype]), reply)

    def footprint(self, kv: KVConfig) -> Footprint:
        """The bytes that a cache takes."""
        return Footprint(self.geometry, kv, self.device, self.reply)

    def activation_bytes(self, context: int, batch: int) -> int:
        """The bytes a forward needs besides, while a prompt is read `PREFILL_CHUNK` tokens at a time.

        For each token of a chunk four vectors of the hidden size (the residual, its norm, queries, the output) and
        three of the widest MLP (gate, up, their product); for each row the logits of one position in fp32, and a copy.
        """
        config = self.geometry.config
        hidden = number(config, "hidden_size", "d_model")
        wide = max(number(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff") or 4 * hidden, hidden)
        experts = number(config, "moe_intermediate_size") * number(config, "num_experts_per_tok")
        token_bytes = (4 * hidden + 3 * max(wide, experts)) * self.dtype.itemsize
        return batch * (min(context, PREFILL_CHUNK) * token_bytes + 2 * 4 * number(config, "vocab_size"))


@dataclass(frozen=True)
class Fit:
    """What fits in a limit.

    Attributes:
        planner: the model to plan for.
        limit: the most bytes.
        most_context: the longest context of the model; None without a limit.
    """

    planner: Planner
    limit: int
    most_context: int | None

    def total(self, weights: Weights, footprint: Footprint, context: int, batch: int) -> int:
        """The bytes on the device."""
        return weights.nbytes + footprint.on_device(context, batch) + self.planner.activation_bytes(context, batch)

    def holds(self, weights: Weights, footprint: Footprint, context: int, batch: int) -> bool:
        """Whether the total is within the limit."""
        return self.total(weights, footprint, context, batch) <= self.limit

    def largest_context(self, weights: Weights, footprint: Footprint, batch: int) -> int:
        """The longest context that fits, but none longer than the model was made for."""
        return largest_that(
            lambda tokens: self.holds(weights, footprint, tokens, batch), self.most_context or MOST_TOKENS
        )

    def largest_batch(self, weights: Weights, footprint: Footprint, context: int) -> int:
        """The most rows that fit."""
        return largest_that(lambda rows: self.holds(weights, footprint, context, rows), MOST_ROWS)


def largest_that(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that `holds`, where all smaller ones do; 0 where 1 does not."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def resolve(model: Any) -> Any:
    """The config behind a name; a model or a config as it is.

    Raises:
        ValueError: there is no config of that name.
    """
    if not isinstance(model, str | os.PathLike):
        return model
    name = os.fspath(model)
    if not name:
        raise ValueError(
            "the model's name is empty; give a shape, a folder that save_pretrained wrote, or a name (org/name)"
        )
    if name in SHAPES:
        return shape_config(name, None)
    folder = Path(name).expanduser()
    is_here, is_hubs = folder.is_dir(), isinstance(model, str) and _HUB.match(name) is not None
    try:
        if not is_here and not is_hubs and not _OLD_HUB.match(name):
            raise ValueError("there is no such folder.")
        # Names without an owner are looked for in what was downloaded before, and not asked for: most are mistyped.
        return AutoConfig.from_pretrained(str(folder) if is_here else name, local_files_only=not is_hubs)
    except (OSError, ValueError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if not is_here and not is_hubs:
            reason = "there is no such folder."
        raise ValueError(
            f"{name!r} is neither a shape ({', '.join(SHAPES)}) nor has it a config that could be read: {reason} "
            "Give a shape, a folder that save_pretrained wrote, or a name on the Hub (org/name)"
        ) from error


def most_context(config: PreTrainedConfig) -> int | None:
    """The longest text that a model was made for, or None where its config does not say."""
    return number(config, "max_position_embeddings", "n_positions") or None


def number(config: PreTrainedConfig, *names: str) -> int:
    """The first of several fields that is a number, or 0; where layers differ, the largest."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # a config that says a number for each layer only (gemma4)
            continue
        if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return 0
