"""`run`: every contender of a setting at every context, checked, timed in turns and put into tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hfkv.bench.attention import AttentionLane, AttentionModule, attention_config, rotated_layers
from hfkv.bench.contenders import NO_CACHE, Contender, ours, peers
from hfkv.bench.errors import BenchError
from hfkv.bench.gate import Errors
from hfkv.bench.memory import peak_of_step
from hfkv.bench.moe import MoEGrid
from hfkv.bench.prefill import LEAST_TURNS as LEAST_PREFILLS
from hfkv.bench.prefill import PrefillLane, Prompt
from hfkv.bench.results import LEFT_OUT, OK, WRONG, Result, Row, Table
from hfkv.bench.reuse import QUESTION, ReuseLane
from hfkv.bench.setting import Setting
from hfkv.bench.shapes import MOST_SHARE, build_model
from hfkv.bench.step import MOST_TURNS as MOST_STEP_TURNS
from hfkv.bench.step import MOST_UNCACHED, STEPS_A_TURN, StepLane, StepTask
from hfkv.bench.tokens import Tokens
from hfkv.measure.machine import describe_machine, free_bytes, load
from hfkv.measure.timing import Turns, bus_bandwidth, copy_bandwidth, free_memory, out_of_memory, quantiles, take_turns
from hfkv.models.shapes import Heads, shape_config, with_layers

# Of a context's progress, what filling and checking take.
FILLING = 0.4
# A step works on copies besides the caches themselves: of one layer, in fp32.
WORKING_COPIES = 4
Progress = Callable[[str, float], None]


def run(setting: Setting, command: str = "", on_progress: Progress = lambda what, share: None) -> Result:
    """Measures a setting.

    Args:
        setting: what to measure.
        command: the command line, for the record.
        on_progress: called with what is running and how much of all is done, 0 to 1.

    Raises:
        BenchError: it does not fit in memory, or names something unknown.
    """
    start, load_before = time.perf_counter(), load()
    with torch.no_grad():
        grid: Grid | MoEGrid = MoEGrid(setting, on_progress) if setting.suite == "moe" else Grid(setting)
        on_progress("measuring the bandwidth", 0.0)
        bandwidths = [copy_bandwidth(grid.device)]
        tables = []
        contexts = [max(setting.ragged)] if setting.ragged else list(setting.contexts)
        for index, context in enumerate(contexts):

            def on_share(what: str, share: float, index: int = index, context: int = context) -> None:
                on_progress(f"{context:,}: {what}", (index + share) / len(contexts))

            tables.append(grid.measure(context, on_share))
            bandwidths.append(copy_bandwidth(grid.device))
    bus, copy = bus_bandwidth(grid.device), max(bandwidths)
    tables = [grid.compared(table, copy, bus) for table in tables]
    result = result_of(setting, tables, grid.device, grid.model_layers, copy, bus, command, start, load_before)
    return replace(result, operations_per_second=grid.peak)


def result_of(
    setting: Setting,
    tables: list[Table],
    device: torch.device,
    model_layers: int,
    copy_bandwidth: float,
    bus_bandwidth: float | None,
    command: str,
    start: float,
    load_before: float | None,
) -> Result:
    """What was measured, with where and when.

    Args:
        setting, command: what was asked for.
        tables: compared.
        device, model_layers, copy_bandwidth, bus_bandwidth: of the machine and the model.
        start, load_before: the clock and the machine's load when the run began.
    """
    return Result(
        command=command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        suite=setting.suite,
        shape=setting.shape or str(setting.model),
        model_layers=model_layers,
        dtype=setting.dtype,
        seed=setting.seed,
        setting=asdict(setting),
        machine={**describe_machine(device), "load_before": load_before},
        copy_bytes_per_second=copy_bandwidth,
        seconds=time.perf_counter() - start,
        tables=tables,
        bus_bytes_per_second=bus_bandwidth,
    )


class Grid:
    """A setting made ready: its config, contenders and, where a suite runs one, its model."""

    peak: float | None = None  # no suite of caches has a floor of operations

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        self.dtype: torch.dtype = getattr(torch, setting.dtype)
        self.batch = len(setting.ragged) or setting.batch
        config = shape_config(setting.shape, setting.model)
        self.model_layers: int = config.num_hidden_layers
        self.heads = Heads.of(config)
        self.is_layer = setting.suite in ("attention", "memory")
        contenders = [*peers(setting.peers, config, self.device), *map(ours, setting.kvs)]
        for contender in contenders:
            if contender.is_ours:
                check_fits(contender, config)
        self.contenders = [_for_suite(contender, setting) for contender in contenders]
        self.turns = Turns(setting.steps, setting.seconds, busy=setting.busy)
        if setting.suite == "step":
            count = None if setting.steps is None else -(-setting.steps // STEPS_A_TURN)
            self.turns = replace(self.turns, count=count, most=MOST_STEP_TURNS)
        if setting.suite in ("prefill", "reuse"):
            self.turns = replace(self.turns, least=LEAST_PREFILLS)
        self.model: PreTrainedModel | None = None
        self.config: PreTrainedConfig = config
        if not self.is_layer:
            self.config = config if setting.layers is None else with_layers(config, setting.layers)
            self.model = build_model(self.config, self.dtype, self.device, setting.seed, setting.layers)

    def measure(self, context: int, on_share: Progress) -> Table:
        """All contenders at one context."""
        num_layers = self._num_layers(context)
        self._check_memory(context, num_layers)
        make_lane = self._lanes(context, num_layers)
        keep_open = self._cache_bytes(context, num_layers) * len(self.contenders) < 0.5 * free_bytes(self.device)
        rows: dict[str, Row] = {}
        lanes: dict[str, Any] = {}
        for index, contender in enumerate(self.contenders):
            on_share(f"filling {contender.name}", FILLING * index / len(self.contenders))
            rows[contender.name] = row = Row(contender.name, contender.is_ours)
            reason = contender.reason or self._context_reason(contender, context)
            if reason is not None:
                rows[contender.name] = replace(row, status=LEFT_OUT, note=reason)
                continue
            lane = make_lane(contender)
            try:
                row = self._prepare(lane, row)
            except (MemoryError, torch.OutOfMemoryError) as error:
                row = replace(row, status=LEFT_OUT, note=out_of_memory(error))
            if row.status == OK and self.setting.suite != "memory":
                lanes[contender.name] = lane
            if row.status != OK or self.setting.suite == "memory" or not keep_open:
                lane.close()
                free_memory()
            rows[contender.name] = row
        times, failed = take_turns(
            list(lanes.values()), self.turns, keep_open, lambda what, share: on_share(what, FILLING + 0.6 * share)
        )
        for name in lanes:
            rows[name] = (
                replace(rows[name], status=LEFT_OUT, note=failed[name])
                if name in failed
                else _timed(rows[name], times[name])
            )
            lanes[name].close()
        free_memory()
        return Table(context, self.batch, list(self.setting.ragged), num_layers, list(rows.values()))

    def compared(self, table: Table, bandwidth: float, bus: float | None) -> Table:
        """The table with its rows' ratios to the fastest peer and to the floor."""
        return replace(table, rows=_compared(table.rows, bandwidth, bus))

    def _prepare(self, lane: Any, row: Row) -> Row:
        """Fills a lane and checks it: the row so far."""
        found: list[tuple[Row, Errors]] = []

        def look() -> None:
            held, allocated, read = lane.held_bytes(), lane.allocated_bytes(), lane.read_bytes()
            known = replace(row, held_bytes=held, allocated_bytes=allocated, read_bytes=read)
            found.append((replace(known, bus_bytes=lane.bus_bytes()), lane.check()))

        peak = None
        if self.setting.suite == "memory":
            peak = peak_of_step(lane, self.device, look)
        else:
            lane.open()
            look()
        filled, errors = found[0]
        return replace(
            filled,
            status=WRONG if errors.wrong else OK,
            note=errors.wrong,
            peak_bytes=peak,
            error_twin=errors.twin,
            error_full=errors.full,
            error_logits=errors.logits,
        )

    def _lanes(self, context: int, num_layers: int) -> Callable[[Contender], Any]:
        setting = self.setting
        if setting.suite == "prefill":
            assert self.model is not None
            lengths = setting.ragged or (context,) * self.batch
            prompt = Prompt.draw(self.model, lengths, setting.seed)
            return lambda contender: PrefillLane(contender, prompt)
        if setting.suite == "reuse":
            assert self.model is not None
            question = Prompt.draw(self.model, (context + QUESTION,) * self.batch, setting.seed)
            return lambda contender: ReuseLane(contender, question, keep_first=self.turns.count == 1)
        tokens = Tokens(self.batch, context, self.heads, self.dtype, self.device, setting.seed)
        if self.is_layer:
            config = attention_config(self.config, num_layers)
            module = AttentionModule(config)
            steps = 0 if setting.suite == "memory" else self.turns.room
            return lambda contender: AttentionLane(contender, config, tokens, module, steps)
        assert self.model is not None
        model = self.model
        ids = Prompt.draw(model, (context + 1,) * self.batch, setting.seed).ids
        task = StepTask(model, tokens, ids)
        return lambda contender: StepLane(contender, task, self.turns.room)

    def _num_layers(self, context: int) -> int:
        if not self.is_layer:
            return self.config.num_hidden_layers
        if self.setting.layers is not None:
            return self.setting.layers
        if self.setting.suite == "memory":
            return 1
        return rotated_layers(self.config, self._cache_bytes(context, 1), self.device)

    def _cache_bytes(self, context: int, num_layers: int) -> int:
        """Bytes of the largest cache: uncompressed."""
        return num_layers * self.batch * context * self.heads.token_bytes(self.dtype)

    def _check_memory(self, context: int, num_layers: int) -> None:
        fp32 = self._cache_bytes(context, 1) * 4 // self.dtype.itemsize
        needed = self._cache_bytes(context, num_layers + 1) + WORKING_COPIES * fp32
        free = free_bytes(self.device)
        if needed > MOST_SHARE * free:
            raise BenchError(
                f"{self.batch} × {context:,} tokens in {num_layers} layers need about {needed / 1e9:.1f} GB for one "
                f"cache and its working copies, and {self.device} has {free / 1e9:.1f} GB free; take a shorter "
                "--context, a smaller --batch or fewer --layers"
            )

    def _context_reason(self, contender: Contender, context: int) -> str | None:
        """Why a contender is not run at this context, or None."""
        if contender.name != NO_CACHE or self.batch * context <= MOST_UNCACHED:
            return None
        return f"a step without a cache reads the whole text again: run for {MOST_UNCACHED:,} tokens at most"


def check_fits(contender: Contender, config: PreTrainedConfig) -> None:
    assert contender.new_cache is not None
    try:
        contender.new_cache(config, 1)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BenchError(f"kv {contender.name!r} on {config.model_type!r}: {error}") from error


def _for_suite(contender: Contender, setting: Setting) -> Contender:
    """The contender, with the reason where a suite as a whole does not run it."""
    reason = contender.reason
    if contender.name == NO_CACHE and setting.suite in ("attention", "memory"):
        reason = "without a cache there is nothing to update and nothing held: see the suite step"
    if contender.kv is not None and contender.kv.reuse is not None and setting.suite != "reuse":
        reason = "it shares prefixes between calls: see the suite reuse"
    if contender.name == NO_CACHE and setting.suite in ("prefill", "reuse"):
        reason = "a prompt is read at the same cost without a cache: see the suite step"
    if contender.is_compiled and setting.suite in ("prefill", "reuse"):
        reason = "transformers compiles decode steps only, and reads the prompt as it does for DynamicCache"
    if contender.is_compiled and setting.suite == "memory":
        # Compiled or not, it allocates the same cache.
        return replace(contender, is_compiled=False, reason=None)
    if contender.graphs and setting.suite != "step":
        reason = "CUDA graphs are of whole decode steps: see the suite step"
    elif contender.graphs and not setting.device.startswith("cuda"):
        reason = "CUDA graphs need a GPU"
    return replace(contender, reason=reason)


def _timed(row: Row, times: Sequence[float]) -> Row:
    p20, p50, p80 = quantiles(times)
    return replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, num_samples=len(times))


def _compared(rows: list[Row], bandwidth: float, bus: float | None) -> list[Row]:
    """The rows with their ratios to the fastest peer and to the floor.

    Args:
        rows: of one table.
        bandwidth: of a copy on the device.
        bus: of a copy to the device, or None.
    """
    best = min((row.p50_ms for row in rows if not row.is_ours and row.p50_ms is not None), default=None)
    compared = []
    for row in rows:
        if row.p50_ms is not None:
            floor_ms = 1e3 * row.read_bytes / bandwidth if row.read_bytes else None
            if floor_ms and bus and row.bus_bytes:
                floor_ms = max(floor_ms, 1e3 * row.bus_bytes / bus)
            row = replace(
                row,
                floor_ms=floor_ms,
                floor_ratio=row.p50_ms / floor_ms if floor_ms else None,
                speedup=best / row.p50_ms if best else None,
            )
        compared.append(row)
    return compared
