"""`run`: every contender of a setting in every cell, checked, timed in turns and put into tables."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime

import torch

from hfkv.bench.lane import Lane
from hfkv.bench.results import LEFT_OUT, OK, Result, Row, Table
from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell, Suite
from hfkv.bench.suites.attention import AttentionSuite
from hfkv.bench.suites.host import HostSuite
from hfkv.bench.suites.memory import MemorySuite
from hfkv.bench.suites.mla import MLASuite
from hfkv.bench.suites.moe import MoESuite
from hfkv.bench.suites.prefill import PromptSuite
from hfkv.bench.suites.step import StepSuite
from hfkv.bench.turns import OUT_OF_MEMORY, Progress, free_memory, out_of_memory, take_turns
from hfkv.measure.machine import describe_machine, free_bytes, load
from hfkv.measure.timing import bus_bandwidth, copy_bandwidth, quantiles

# Of a cell's progress, what filling and checking take.
CHECKING = 0.4
_SUITES: dict[str, type[Suite]] = {
    "attention": AttentionSuite,
    "step": StepSuite,
    "memory": MemorySuite,
    "prefill": PromptSuite,
    "reuse": PromptSuite,
    "host": HostSuite,
    "moe": MoESuite,
    "mla": MLASuite,
}


def run(setting: Setting, command: str = "", on_progress: Progress = lambda what, share: None) -> Result:
    """Measures a setting.

    Args:
        setting: what to measure.
        command: the command line, for the record.
        on_progress: called with what is running and how much of all is done, 0 to 1.

    Raises:
        BenchError: it does not fit in memory, or names something unknown.
    """
    start, load_before, threads = time.perf_counter(), load(), torch.get_num_threads()
    try:
        return _run(setting, command, on_progress, start, load_before)
    finally:
        torch.set_num_threads(threads)


def _run(setting: Setting, command: str, on_progress: Progress, start: float, load_before: float | None) -> Result:
    with torch.no_grad():
        on_progress("building the layers", 0.0)
        suite = _SUITES[setting.suite](setting)
        on_progress("measuring the bandwidth", 0.0)
        bandwidths = [copy_bandwidth(suite.device)]
        tables = []
        for index, cell in enumerate(suite.cells):

            def on_share(what: str, share: float, index: int = index, cell: Cell = cell) -> None:
                on_progress(f"{cell}: {what}", (index + share) / len(suite.cells))

            tables.append(measure(suite, cell, on_share))
            bandwidths.append(copy_bandwidth(suite.device))
    copy, bus = max(bandwidths), bus_bandwidth(suite.device)
    return Result(
        command=command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        suite=setting.suite,
        shape=setting.shape or str(setting.model),
        model_layers=suite.model_layers,
        dtype=setting.dtype,
        seed=setting.seed,
        setting=setting.record(),
        machine={**describe_machine(suite.device), "load_before": load_before},
        copy_bytes_per_second=copy,
        seconds=time.perf_counter() - start,
        tables=[compared(suite, cell, table, copy, bus) for cell, table in zip(suite.cells, tables, strict=True)],
        bus_bytes_per_second=bus,
        operations_per_second=suite.peak,
    )


def measure(suite: Suite, cell: Cell, on_share: Progress) -> Table:
    """All contenders of a cell, checked and timed."""
    contenders = suite.contenders_of(cell)
    make_lane = suite.lanes(cell)
    keep_open = suite.cache_bytes(cell) * len(contenders) < 0.5 * free_bytes(suite.device)
    rows: dict[str, Row] = {}
    lanes: list[Lane] = []
    for index, contender in enumerate(contenders):
        on_share(f"checking {contender.name}", CHECKING * index / len(contenders))
        row = Row(contender.name, contender.is_ours)
        reason = suite.reason(contender, cell)
        if reason is None:
            lane = make_lane(contender)
            try:
                row = replace(row, **lane.prepare())
            except OUT_OF_MEMORY as error:
                reason = out_of_memory(error)
            is_timed = suite.turns(cell).count != 0 and reason is None and row.status == OK
            if is_timed:
                lanes.append(lane)
            if not is_timed or not keep_open:
                lane.close()
                free_memory()
        rows[contender.name] = row if reason is None else replace(row, status=LEFT_OUT, note=reason)
    take_turns(
        lanes, suite.turns(cell), keep_open, lambda what, share: on_share(what, CHECKING + (1 - CHECKING) * share)
    )
    for lane in lanes:
        row = rows[lane.name]
        if lane.failure is None:
            p20, p50, p80 = quantiles(lane.times)
            row = replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, num_samples=len(lane.times), **lane.counted())
        rows[lane.name] = row if lane.failure is None else replace(row, status=LEFT_OUT, note=lane.failure)
        lane.close()
    free_memory()
    return Table(cell.context, suite.batch, list(suite.setting.ragged), cell.layers, list(rows.values()))


def compared(suite: Suite, cell: Cell, table: Table, copy: float, bus: float | None) -> Table:
    """The table with its rows' ratios to the base, or to the fastest peer, and to the floor.

    Bytes are copied on the device at `copy` a second, and to it at `bus`, if there is one.
    """
    times = {row.contender: row.p50_ms for row in table.rows if row.p50_ms is not None}
    bases = suite.bases(cell)
    base = next((name for name in bases if name in times), None)
    peers = [row.contender for row in table.rows if not row.is_ours and row.contender in times]
    best = min((times[name] for name in ((base,) if bases else peers) if name is not None), default=None)
    bare = {contender.name: contender.bare for contender in suite.contenders}
    rows = []
    for row in table.rows:
        if row.p50_ms is not None:
            floor_ms, bare_ms = _floor_ms(row, copy, bus, suite.peak), times.get(bare.get(row.contender) or "")
            row = replace(
                row,
                floor_ms=floor_ms,
                floor_ratio=row.p50_ms / floor_ms if floor_ms else None,
                speedup=best / row.p50_ms if best else None,
                lora_ratio=row.p50_ms / bare_ms if bare_ms else None,
            )
        rows.append(row)
    return replace(table, rows=rows, base=base)


def _floor_ms(row: Row, copy: float, bus: float | None, peak: float | None) -> float | None:
    """The longest of what its bytes and its operations take at least; None where it has no bytes to read."""
    if not row.read_bytes:
        return None
    speeds = ((row.read_bytes, copy), (row.bus_bytes, bus), (row.operations, peak))
    seconds = [count / speed for count, speed in speeds if count and speed]
    return 1e3 * max(seconds)
