"""The suite ``moe``: the experts of one layer, called with a new random routing at every turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from hfkv.bench.contenders import Contender
from hfkv.bench.errors import BenchError
from hfkv.bench.gate import Errors
from hfkv.bench.lane import Lane
from hfkv.bench.models import check_room
from hfkv.bench.moe_calls import Calls, Gate
from hfkv.bench.moe_layers import (
    BATCHED,
    GROUPED,
    MOE_SHAPES,
    PEFT,
    Adapters,
    Layer,
    Reference,
    build_layer,
    ours,
    peers,
    stock_model,
)
from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell, Suite
from hfkv.bench.turns import out_of_memory
from hfkv.experts.packed import PackedWeights, unpackable
from hfkv.measure.machine import free_bytes
from hfkv.measure.timing import milliseconds, quantiles, queued_milliseconds
from hfkv.policy.errors import RequestError

# Calls of one turn on an accelerator: its clock is too coarse for one.
CALLS_A_TURN = {"cpu": 1, "other": 8}
# `batched_mm` copies the weights of every choice of every token: beyond so much it is not waited for on a CPU, and does
# not fit beyond so large a part of what an accelerator has free.
MOST_COPIED, MOST_COPIED_SHARE = 10**9, 0.5
# On an accelerator transformers' generate() decodes with `batched_mm` and reads prompts with `grouped_mm`.
MOST_DECODED = 128
# A contender more than so many times as slow as `grouped_mm` sits out turns, so that the others have more of them: it
# takes every fourth at least.
SLOW, MOST_SAT_OUT = 5.0, 4
LEAST_TURNS = 8
# Sides of the square matrices whose product shows the peak.
PEAK_SIZE, PEAK_PRODUCTS = {"cpu": 2048, "other": 8192}, 5


class MoELane(Lane):
    """One contender's layer at one number of tokens.

    Args:
        contender: whose.
        layer: its experts, there for the whole run.
        calls: what it is called with, the same for all.
        gate: checks what it returns.
        pace: of the lane that the slow ones are measured by, which warms up before them; None where none sits out.
    """

    def __init__(
        self, contender: Contender, layer: Layer, calls: Calls, gate: Gate, pace: MoELane | None = None
    ) -> None:
        super().__init__(contender)
        self.layer = layer
        self.calls = calls
        self.gate = gate
        self.num_calls = CALLS_A_TURN["cpu" if calls.device.type == "cpu" else "other"]
        self.num_chosen: list[int] = []
        self.pace = pace
        self.warm_ms = 0.0
        self._turn = -1

    def figures(self) -> dict[str, Any]:
        """Bytes of the weights, and how they are kept."""
        return {"held_bytes": self.layer.held_bytes, "form": self.layer.form}

    def check(self) -> Errors:
        return self.gate.errors(self.contender, self.layer)

    def warm_up(self) -> None:
        """Two turns that are not timed; the second says how long one takes, or on a GPU its launching."""
        for _ in range(2):
            begin = time.perf_counter()
            self._run(0)
            self.warm_ms = 1e3 * (time.perf_counter() - begin)

    def turn(self) -> list[float]:
        """The next calls, as ms a call; nothing where it sits out."""
        self._turn += 1
        if self._turn % self.every:
            return []
        start = self._turn * self.num_calls
        self.num_chosen += [self.calls[start + index].num_chosen for index in range(self.num_calls)]
        return [queued_milliseconds(lambda: self._run(start), self.calls.device, self.warm_ms) / self.num_calls]

    def counted(self) -> dict[str, Any]:
        """The bytes of the experts that were chosen in the median call, and its operations."""
        shape = self.calls.shape
        return {
            "read_bytes": int(self.layer.held_bytes * quantiles(self.num_chosen)[1] / shape.experts),
            "operations": 2 * self.calls.tokens * shape.top_k * shape.expert_size,
        }

    @property
    def every(self) -> int:
        """How many turns go by until it takes the next one."""
        if self.pace is None or not self.pace.warm_ms:
            return 1
        return min(max(round(self.warm_ms / (SLOW * self.pace.warm_ms)), 1), MOST_SAT_OUT)

    def _run(self, start: int) -> None:
        for index in range(start, start + self.num_calls):
            self.calls[index].run(self.layer.experts)


class MoESuite(Suite):
    """The suite; every contender's layer is built here."""

    least_turns = LEAST_TURNS

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.shape not in MOE_SHAPES:
            raise BenchError(f"the suite moe has no shape {setting.shape!r}; allowed: {', '.join(MOE_SHAPES)}")
        self.shape = MOE_SHAPES[setting.shape]
        self.contenders = [*peers(setting.peers, self.device), *map(ours, setting.moes)]
        self.cells = [Cell(tokens) for tokens in setting.contexts]
        self._check_memory()
        stock = stock_model(self.shape, self.dtype, self.device, setting.seed)
        adapters = Adapters(self.shape, self.device, setting.seed + 1)
        self.references = {False: Reference(stock, None), True: Reference(stock, adapters)}
        self.layers: dict[str, Layer] = {}
        for index, contender in enumerate(self.contenders):
            try:
                if contender.reason is None:
                    self.layers[contender.name] = build_layer(contender, stock, adapters)
            except (MemoryError, torch.OutOfMemoryError) as error:
                self.contenders[index] = replace(contender, reason=out_of_memory(error))
            except RequestError as error:
                self.contenders[index] = replace(contender, reason=str(error))
        self.peak = matmul_peak(self.device, self.dtype)

    def lanes(self, cell: Cell) -> Callable[[Contender], Lane]:
        """The layers, with the same calls for all."""
        setting = self.setting
        calls, checked = (
            Calls(self.shape, cell.context, self.dtype, self.device, seed) for seed in (setting.seed, setting.seed + 1)
        )
        gate = Gate(self.references, checked)
        made: list[MoELane] = []

        def lane(contender: Contender) -> MoELane:
            pace = made[0] if made and setting.steps is None else None
            made.append(MoELane(contender, self.layers[contender.name], calls, gate, pace))
            return made[-1]

        return lane

    def reason(self, contender: Contender, cell: Cell) -> str | None:
        copied = cell.context * self.shape.top_k * self.shape.expert_size * self.dtype.itemsize
        most = MOST_COPIED if self.device.type == "cpu" else MOST_COPIED_SHARE * free_bytes(self.device)
        if contender.name == BATCHED and contender.reason is None and copied > most:
            return f"it copies the weights of every choice: {copied / 1e9:.1f} GB, run up to {most / 1e9:.1f} GB"
        return contender.reason

    def bases(self, cell: Cell) -> tuple[str, ...]:
        """What transformers' `generate` would run."""
        is_decode = self.device.type != "cpu" and cell.context <= MOST_DECODED
        return (BATCHED, GROUPED) if is_decode else (GROUPED,)

    def _check_memory(self) -> None:
        """All layers are there at once, one more that they are made from, and what PEFT multiplies out."""
        plain = self.shape.experts * self.shape.expert_size * self.dtype.itemsize
        copies = [c for c in self.contenders if c.reason is None]
        check_room(
            f"the experts of {self.setting.shape} are {plain / 1e9:.1f} GB, and {len(copies)} contenders",
            plain * (len(copies) + 1 + any(c.name == PEFT for c in copies)),
            self.device,
            f"name fewer with --moe and --peers ({GROUPED} is always among them), or take a smaller --shape",
        )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of several large matrix products; a CPU's also in oneDNN's order."""
    size = PEAK_SIZE["cpu" if device.type == "cpu" else "other"]
    x, matrix = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    products: list[Callable[[], object]] = [lambda: F.linear(x, matrix)]
    if unpackable(matrix[None]) is None:
        packed = PackedWeights(matrix[None])
        products.append(lambda: packed.linear(x, 0))
    best = min(milliseconds(product, device) for product in products for _ in range(PEAK_PRODUCTS))
    return 2 * size**3 / (1e-3 * best)
