"""What ``hfkv bench`` shows: a table a context, what was left out and why, and the verdicts of a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.cli.bench_mla_words import mla_notes, mla_title
from hfkv.cli.bench_moe_words import moe_notes, moe_title
from hfkv.cli.tables import SPACE, wrap

if TYPE_CHECKING:
    from hfkv.bench import Result, Row, Verdict
    from hfkv.bench import Table as Measured

# A speedup this much below 1 is coloured as bearable.
BEARABLE_SPEEDUP = 0.9
# A load on the machine before a run that does not disturb it.
MOST_LOAD = 0.5
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
# A unit is taken for a table where its smallest figure holds so many of it.
LEAST_UNITS = 0.1
SPREAD, TO_OWN, SHARE = "p20–p80\n", "error\nto own", "of Dyna-\nmicCache"
# Left out, in this order, where they would leave less than the longest peer's name.
DISPENSABLE = (SPREAD, TO_OWN, SHARE)


def show(result: Result, console: Console) -> None:
    """Prints a result, at the console's width."""
    for measured in result.tables:
        console.print()
        console.print(Padding(Text(_title(result, measured), "bold"), (0, 1)))
        console.print(_table(result, measured, console.width))
        notes = [row for row in measured.rows if row.note is not None]
        if notes:
            console.print(Padding(_notes(notes), (0, 1, 1, 1)))
    console.print(Padding(_caption(result), (0, 1)))


def show_verdicts(verdicts: list[Verdict], console: Console) -> None:
    """Prints what was asked of a result and what was seen."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("target")
    for header in ("wanted", "seen", "verdict"):
        table.add_column(header, justify="right", no_wrap=True)
    styles = {"held": "green", "missed": "bold red", "not measured": "dim"}
    for verdict in verdicts:
        target = verdict.target
        name = str(target).replace("*", verdict.contender) if verdict.contender != target.contender else str(target)
        if verdict.note is not None:
            name += f" ({verdict.note})"
        wanted, seen = [], []
        if target.at_least is not None or target.at_most is not None:
            wanted.append(f"≥ {target.at_least:g}" if target.at_least is not None else f"≤ {target.at_most:g}")
            seen.append("-" if verdict.ratio is None else f"{verdict.ratio:.2f}")
        if target.max_held is not None:
            wanted.append(f"bytes ≤ {target.max_held:g}")
            seen.append("-" if verdict.held is None else f"{verdict.held:.3f}")
        if target.max_error is not None:
            wanted.append(f"error ≤ {target.max_error:g}")
            seen.append("-" if verdict.error is None else f"{verdict.error:.1e}")
        style = styles[verdict.verdict]
        table.add_row(name, "\n".join(wanted), "\n".join(seen), Text(verdict.verdict, style))
    console.print()
    console.print(table)
    counts = {name: sum(verdict.verdict == name for verdict in verdicts) for name in styles}
    line = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.print(Padding(Text(line, "bold red" if counts["missed"] else ""), (0, 1)))


def _title(result: Result, measured: Measured) -> str:
    if result.suite == "moe":
        return moe_title(result, measured)
    if result.suite == "mla":
        return mla_title(result, measured)
    if measured.ragged:
        rows = f"left-padded rows of {', '.join(f'{length:,}' for length in measured.ragged)} tokens"
    else:
        rows = f"{measured.batch} × {measured.context:,} tokens"
    layers = f"{measured.layers} layer{'s' if measured.layers != 1 else ''}"
    return f"{result.suite}: {result.shape}, {result.dtype}, {layers}, {rows}"


def _table(result: Result, measured: Measured, width: int) -> Table:
    columns = _columns(result, measured)
    narrowest = max(len(row.contender) for row in measured.rows if not row.is_ours)
    for header in DISPENSABLE:
        if header in columns and _room(columns, width) < narrowest:
            del columns[header]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("experts\n" if result.suite == "moe" else "cache\n", no_wrap=True)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    num_peers = sum(not row.is_ours for row in measured.rows)
    for index, row in enumerate(measured.rows):
        name = wrap(row.contender, _room(columns, width)) if row.is_ours else row.contender
        style = "bold" if row.is_ours else ""
        cells = [cells[index] for cells in columns.values()]
        table.add_row(Text(name, style), *cells, end_section=index == num_peers - 1)
    return table


def _columns(result: Result, measured: Measured) -> dict[str, list[Text]]:
    """The cells of every column by its header, two lines."""
    rows = measured.rows
    if result.suite == "memory":
        return _memory_columns(result, measured)
    times = "× stock\n" if result.suite == "mla" else "× best\npeer"
    if result.suite == "moe":
        times = f"×\n{measured.base}" if measured.base else "× base\n"
    columns = {
        "median\nms": [_main(row, row.p50_ms) for row in rows],
        SPREAD: [_cell(row.p20_ms and f"{_ms(row.p20_ms)}–{_ms(row.p80_ms)}", "dim") for row in rows],
        times: [_speedup(row) for row in rows],
    }
    if any(row.lora_ratio is not None for row in rows):
        columns["× with-\nout LoRA"] = [_cell(row.lora_ratio and _ms(row.lora_ratio)) for row in rows]
    if any(row.floor_ratio is not None for row in rows):
        columns["× its\nfloor"] = [_cell(row.floor_ratio and _ms(row.floor_ratio)) for row in rows]
    unit, unit_name = _unit([row.held_bytes for row in rows if row.held_bytes])
    columns[f"held\n{unit_name}"] = [_bytes(row.held_bytes, unit) for row in rows]
    plain = next((row.held_bytes for row in rows if row.held_bytes), None)
    if plain and result.suite in ("moe", "mla"):
        columns["of\nplain" if result.suite == "moe" else SHARE] = [
            _cell(row.held_bytes and f"{row.held_bytes / plain:.3f}") for row in rows
        ]
    return {**columns, **_errors(rows, "error\nto fp32" if result.suite == "moe" else "error\nto full")}


def _memory_columns(result: Result, measured: Measured) -> dict[str, list[Text]]:
    rows = measured.rows
    tokens = measured.batch * measured.context
    unit, unit_name = _unit([row.held_bytes for row in rows if row.held_bytes])
    whole, whole_name = _unit([row.held_bytes * result.model_layers for row in rows if row.held_bytes])
    full = next(row.held_bytes for row in rows if row.contender == "DynamicCache") or 0
    layers = f"× {result.model_layers}\n{whole_name}"
    return {
        f"held\n{unit_name}": [_main(row, row.held_bytes, unit) for row in rows],
        SHARE: [_cell(row.held_bytes and full and f"{row.held_bytes / full:.3f}") for row in rows],
        "bytes a\ntoken": [_cell(row.held_bytes and f"{row.held_bytes / tokens:,.0f}") for row in rows],
        f"alloc\n{unit_name}": [_bytes(row.allocated_bytes, unit) for row in rows],
        f"peak\n{unit_name}": [_bytes(row.peak_bytes, unit) for row in rows],
        layers: [_bytes(row.held_bytes and row.held_bytes * result.model_layers, whole) for row in rows],
    }


def _errors(rows: list[Row], to_full: str) -> dict[str, list[Text]]:
    columns = {
        TO_OWN: [row.error_twin for row in rows],
        to_full: [row.error_full for row in rows],
        "logits'\nerror": [row.error_logits for row in rows],
    }
    return {
        header: [_cell(None if error is None else f"{error:.1e}") for error in errors]
        for header, errors in columns.items()
        if any(error is not None for error in errors)
    }


def _room(columns: dict[str, list[Text]], width: int) -> int:
    """What the other columns leave for the contender's name."""
    texts = [[*header.split("\n"), *(cell.plain for cell in cells)] for header, cells in columns.items()]
    return width - SPACE - sum(max(map(len, column)) + SPACE for column in texts)


def _main(row: Row, value: float | None, unit: float = 0) -> Text:
    """A row's first figure, or what became of it."""
    if row.status != "ok":
        return Text(row.status, "bold red" if row.status == "wrong" else "dim")
    return _bytes(value, unit) if unit else _cell(value is not None and _ms(value))


def _cell(text: object, style: str = "") -> Text:
    return Text(str(text), style) if text else Text("-", "dim")


def _speedup(row: Row) -> Text:
    if row.speedup is None:
        return Text("-", "dim")
    style = "green" if row.speedup >= 1 else "yellow" if row.speedup >= BEARABLE_SPEEDUP else "red"
    return Text(f"{row.speedup:.2f}", style if row.is_ours else "")


def _ms(value: float | None) -> str:
    from hfkv.bench.plots import digits

    return "-" if value is None else digits(value)


def _bytes(value: float | None, unit: float) -> Text:
    if value is None:
        return Text("-", "dim")
    amount = value / unit
    return Text(f"{amount:,.0f}" if amount >= 100 else f"{amount:.1f}" if amount >= 10 else f"{amount:.2f}")


def _unit(values: list[int]) -> tuple[float, str]:
    least = min(values, default=0)
    return next((unit for unit in UNITS if least >= LEAST_UNITS * unit[0]), UNITS[-1])


def _notes(rows: list[Row]) -> Table:
    notes = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        style = "red" if row.status == "wrong" else "dim"
        notes.add_row(Text(row.contender, "cyan", no_wrap=True), Text(f"{row.status}: {row.note}", style))
    return notes


def _caption(result: Result) -> Table:
    machine = result.machine
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    place = machine["accelerator"] or f"{machine['processor']}, {machine['instructions']}"
    notes = {
        "where": f"{place}, {machine['device']}, {threads}; hfkv {machine['hfkv']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {result.seconds:.0f} s",
    }
    has_floor = any(row.floor_ms is not None for table in result.tables for row in table.rows)
    if result.suite == "moe":
        return _grid({**notes, **moe_notes(result), **_busy(result)})
    if result.suite == "mla":
        return _grid({**notes, **mla_notes(result), **_busy(result)})
    if result.suite != "memory":
        what = {"attention": "one layer's update and attention", "step": "a decode step of generate()"}
        notes["median"] = f"of {what.get(result.suite, 'a prompt to its first new token')}; all caches take turns"
        notes["× peer"] = "the fastest peer's time by this one's: above 1 is faster than every peer"
    if has_floor:
        speed = result.copy_bytes_per_second / 1e9
        notes["× floor"] = (
            "its time by the time a copy of the bytes it must read would take; a copy reads and writes "
            f"{speed:,.1f} GB/s here"
        )
        if result.bus_bytes_per_second:
            notes["× floor"] += f"; what is offloaded comes at {result.bus_bytes_per_second / 1e9:,.1f} GB/s"
    held = dict.fromkeys(("step", "prefill", "reuse"), "by all layers").get(result.suite, "by one layer")
    notes["held"] = f"{held}, in keys and values"
    if result.suite in ("attention", "memory"):
        notes["error"] = (
            "of the attention, as norms: to fp32 attention over what it holds (own), and over the tokens it shows "
            "before they were encoded (full)"
        )
    else:
        notes["error"] = "of the logits against DynamicCache's, as norms"
    if result.suite == "memory":
        notes["error"] = "not shown; the attention of every cache was checked against fp32"
        notes["peak"] = "the most allocated during one step of the layer, the cache included"
        notes[f"× {result.model_layers}"] = "held by the whole model"
    return _grid({**notes, **_busy(result)})


def _busy(result: Result) -> dict[str, str]:
    machine, busy = result.machine, result.setting.get("busy")
    if busy:
        processes = f"{busy} other process{'es' if busy != 1 else ''}"
        return {"beside": f"{processes} that kept cores busy all the time (--busy), of {machine['cores']} cores"}
    load = machine["load_before"]
    if load is None or load <= MOST_LOAD:
        return {}
    return {
        "beware": f"there was a load of {load:.1f} on {machine['cores']} cores before the run: threads that wait for "
        "each other take many times as long as on an idle machine"
    }


def _grid(notes: dict[str, str]) -> Table:
    caption = Table.grid(padding=(0, 2, 0, 0))
    for name, note in notes.items():
        caption.add_row(Text(name, "cyan", no_wrap=True), Text(note, "dim"))
    return caption
