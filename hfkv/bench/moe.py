"""The suite ``moe``: the experts of one layer, called with a new random routing at every turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from hfkv.bench.errors import BenchError
from hfkv.bench.moe_calls import Calls, Gate
from hfkv.bench.moe_layers import (
    BATCHED,
    GROUPED,
    MOE_SHAPES,
    PEFT,
    Adapters,
    Contender,
    Layer,
    Reference,
    build_layer,
    ours,
    peers,
    stock_model,
)
from hfkv.bench.results import LEFT_OUT, OK, WRONG, Row, Table
from hfkv.bench.setting import Setting
from hfkv.bench.shapes import MOST_SHARE
from hfkv.experts.packed import PackedWeights, unpackable
from hfkv.measure.machine import free_bytes
from hfkv.measure.timing import Turns, milliseconds, out_of_memory, quantiles, queued_milliseconds, take_turns
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
# Of a number of tokens' progress, what checking takes.
CHECKING = 0.3
Progress = Callable[[str, float], None]


class MoELane:
    """One contender's layer at one number of tokens.

    Args:
        contender: whose.
        layer: its experts.
        calls: what it is called with, the same for all.
        pace: of the lane that the slow ones are measured by, which warms up before them; None where none sits out.
    """

    def __init__(self, contender: Contender, layer: Layer, calls: Calls, pace: MoELane | None = None) -> None:
        self.name = contender.name
        self.experts = layer.experts
        self.calls = calls
        self.num_calls = CALLS_A_TURN["cpu" if calls.device.type == "cpu" else "other"]
        self.num_chosen: list[int] = []
        self.pace = pace
        self.warm_ms = 0.0
        self._turn = -1

    def open(self) -> None:
        """Nothing: the layers are there for the whole run."""

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
        device = self.calls.device
        if device.type == "cuda":
            total = queued_milliseconds(lambda: self._run(start), device, self.warm_ms)
        else:
            total = milliseconds(lambda: self._run(start), device)
        return [total / self.num_calls]

    @property
    def every(self) -> int:
        """Of so many turns it takes one."""
        if self.pace is None or not self.pace.warm_ms:
            return 1
        return min(max(round(self.warm_ms / (SLOW * self.pace.warm_ms)), 1), MOST_SAT_OUT)

    def close(self) -> None:
        """Nothing: the layers are there for the whole run."""

    def _run(self, start: int) -> None:
        for index in range(start, start + self.num_calls):
            self.calls[index].run(self.experts)


class MoEGrid:
    """A setting of the suite made ready: every contender's layer.

    Args:
        setting: what to measure.
        on_progress: called with what is being built, and 0.

    Attributes:
        peak: operations a second of a large matrix product here.

    Raises:
        BenchError: it names something unknown, or does not fit in memory.
    """

    model_layers = 1

    def __init__(self, setting: Setting, on_progress: Progress) -> None:
        if setting.shape not in MOE_SHAPES:
            raise BenchError(f"the suite moe has no shape {setting.shape!r}; allowed: {', '.join(MOE_SHAPES)}")
        self.setting = setting
        self.shape = MOE_SHAPES[setting.shape]
        self.device = torch.device(setting.device)
        self.dtype: torch.dtype = getattr(torch, setting.dtype)
        self.contenders = [*peers(setting.peers, self.device), *map(ours, setting.moes)]
        self._check_memory()
        on_progress("building the layer", 0.0)
        stock = stock_model(self.shape, self.dtype, self.device, setting.seed)
        adapters = Adapters(self.shape, self.device, setting.seed + 1)
        self.references = {False: Reference(stock, None), True: Reference(stock, adapters)}
        self.layers: dict[str, Layer] = {}
        for index, contender in enumerate(self.contenders):
            on_progress(f"building {contender.name}", 0.0)
            try:
                if contender.reason is None:
                    self.layers[contender.name] = build_layer(contender, stock, adapters)
            except (MemoryError, torch.OutOfMemoryError) as error:
                self.contenders[index] = replace(contender, reason=out_of_memory(error))
            except RequestError as error:
                self.contenders[index] = replace(contender, reason=str(error))
        on_progress("measuring the peak", 0.0)
        self.peak = matmul_peak(self.device, self.dtype)

    def measure(self, context: int, on_share: Progress) -> Table:
        """All contenders at one number of tokens."""
        setting = self.setting
        calls = Calls(self.shape, context, self.dtype, self.device, setting.seed)
        rows: dict[str, Row] = {}
        lanes: list[MoELane] = []
        gate = Gate(self.references, Calls(self.shape, context, self.dtype, self.device, setting.seed + 1))
        for index, contender in enumerate(self.contenders):
            on_share(f"checking {contender.name}", CHECKING * index / len(self.contenders))
            row = Row(contender.name, contender.is_ours)
            reason = contender.reason or self._tokens_reason(contender, context)
            if reason is None:
                row, reason = self._checked(contender, row, gate)
            if reason is not None:
                row = replace(row, status=LEFT_OUT, note=reason)
            elif row.status == OK:
                pace = lanes[0] if lanes and setting.steps is None else None
                lanes.append(MoELane(contender, self.layers[contender.name], calls, pace))
            rows[contender.name] = row
        turns = Turns(setting.steps, setting.seconds, least=LEAST_TURNS, busy=setting.busy)
        times, failed = take_turns(
            lanes, turns, True, lambda what, share: on_share(what, CHECKING + (1 - CHECKING) * share)
        )
        for lane in lanes:
            name = lane.name
            rows[name] = (
                replace(rows[name], status=LEFT_OUT, note=failed[name])
                if name in failed
                else self._timed(rows[name], times[name], lane)
            )
        return Table(context, 1, [], 1, list(rows.values()))

    def compared(self, table: Table, bandwidth: float, bus: float | None) -> Table:
        """The table with its rows' ratios to the base and to the floor.

        Args:
            table: as `measure` gave it.
            bandwidth: of a copy on the device.
            bus: None here: nothing is offloaded.
        """
        is_decode = self.device.type != "cpu" and table.context <= MOST_DECODED
        order = (BATCHED, GROUPED) if is_decode else (GROUPED,)
        base = next((name for name in order if _time(table, name) is not None), None)
        without = {contender.name: contender.without_lora for contender in self.contenders if contender.has_lora}
        rows = []
        for row in table.rows:
            if row.p50_ms is not None and row.read_bytes is not None and row.operations is not None:
                floor_ms = 1e3 * max(row.read_bytes / bandwidth, row.operations / self.peak)
                base_ms = None if base is None else _time(table, base)
                bare_ms = _time(table, without[row.contender]) if row.contender in without else None
                row = replace(
                    row,
                    floor_ms=floor_ms,
                    floor_ratio=row.p50_ms / floor_ms,
                    speedup=base_ms / row.p50_ms if base_ms else None,
                    lora_ratio=row.p50_ms / bare_ms if bare_ms else None,
                )
            rows.append(row)
        return replace(table, rows=rows, base=base)

    def _checked(self, contender: Contender, row: Row, gate: Gate) -> tuple[Row, str | None]:
        layer = self.layers[contender.name]
        row = replace(row, held_bytes=layer.held_bytes, form=layer.form)
        try:
            errors = gate.errors(contender, layer)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return row, out_of_memory(error)
        return replace(row, status=WRONG if errors.wrong else OK, note=errors.wrong, error_full=errors.full), None

    def _timed(self, row: Row, times: list[float], lane: MoELane) -> Row:
        p20, p50, p80 = quantiles(times)
        num_chosen = quantiles(lane.num_chosen)[1]
        assert row.held_bytes is not None
        return replace(
            row,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            num_samples=len(times),
            read_bytes=int(row.held_bytes * num_chosen / self.shape.experts),
            operations=2 * lane.calls.tokens * self.shape.top_k * self.shape.expert_size,
        )

    def _tokens_reason(self, contender: Contender, tokens: int) -> str | None:
        """Why a contender is not run with so many tokens, or None."""
        if contender.name != BATCHED:
            return None
        copied = tokens * self.shape.top_k * self.shape.expert_size * self.dtype.itemsize
        most = MOST_COPIED if self.device.type == "cpu" else MOST_COPIED_SHARE * free_bytes(self.device)
        if copied <= most:
            return None
        return f"it copies the weights of every choice: {copied / 1e9:.1f} GB, run up to {most / 1e9:.1f} GB"

    def _check_memory(self) -> None:
        """All layers are there at once, one more that they are made from, and what PEFT multiplies out."""
        plain = self.shape.experts * self.shape.expert_size * self.dtype.itemsize
        copies = [c for c in self.contenders if c.reason is None]
        needed = plain * (len(copies) + 1 + any(c.name == PEFT for c in copies))
        free = free_bytes(self.device)
        if needed > MOST_SHARE * free:
            raise BenchError(
                f"the experts of {self.setting.shape} are {plain / 1e9:.1f} GB, and {len(copies)} contenders need "
                f"about {needed / 1e9:.1f} GB; {self.device} has {free / 1e9:.1f} GB free. Name fewer with --moe and "
                f"--peers ({GROUPED} is always among them), or take a smaller --shape"
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


def _time(table: Table, name: str) -> float | None:
    row = table.row(name)
    return None if row is None else row.p50_ms
