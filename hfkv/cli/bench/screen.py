"""What ``hfkv bench`` shows: a table a context, what was left out and why, and the verdicts of a check."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.bench import MLA_SHAPES, MOE_SHAPES, Result, Row, Verdict
from hfkv.bench import Table as Measured
from hfkv.bench.plots import digits
from hfkv.bench.results import plural
from hfkv.cli.bench.notes import caption
from hfkv.cli.tables import Columns, drop_to_fit, new_table, notes_grid, room, table_of, unit_of, wider, wrap

# A speedup this much below 1 is coloured as bearable.
BEARABLE_SPEEDUP = 0.9
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
# A unit is taken for a table where its smallest figure holds so many of it.
LEAST_UNITS = 0.1
SPREAD, TO_OWN, SHARE = "p20–p80\n", "error\nto own", "of Dyna-\nmicCache"
NARROWEST_TARGET = 20
# Left out, in this order, where they would leave less than the longest peer's name.
DISPENSABLE = (SPREAD, TO_OWN, SHARE)
STYLES = {"held": "green", "missed": "bold red", "not measured": "dim"}


def show(result: Result, console: Console) -> None:
    """Prints a result, at the console's width."""
    gone: dict[str, None] = {}
    for measured in result.tables:
        console.print()
        console.print(Padding(Text(_title(result, measured), "bold"), (0, 1)))
        table, dropped = _table(result, measured, console.width)
        console.print(table)
        gone |= dict.fromkeys(dropped)
        notes = {
            row.contender: Text(f"{row.status}: {row.note}", "red" if row.status == "wrong" else "dim")
            for row in measured.rows
            if row.note is not None
        }
        if notes:
            console.print(Padding(notes_grid(notes), (0, 1, 1, 1)))
    console.print(Padding(notes_grid(caption(result) | wider(gone)), (0, 1)))


def show_verdicts(verdicts: list[Verdict], console: Console) -> None:
    """Prints what was asked of a result and what was seen."""
    rows = []
    for verdict in verdicts:
        target = verdict.target
        name = str(target).replace("*", verdict.contender) if verdict.contender != target.contender else str(target)
        if verdict.result is not None:
            name += f", result {verdict.result}"
        if verdict.note is not None:
            name += f" ({verdict.note})"
        parts = (
            ("≥ ", target.at_least, verdict.ratio, ".2f"),
            ("≤ ", target.at_most, verdict.ratio, ".2f"),
            ("bytes ≤ ", target.max_held, verdict.held, ".3f"),
            ("error ≤ ", target.max_error, verdict.error, ".1e"),
        )
        wanted = [f"{what}{limit:g}" for what, limit, _, _ in parts if limit is not None]
        seen = ["-" if value is None else f"{value:{form}}" for _, limit, value, form in parts if limit is not None]
        rows.append((name, "\n".join(wanted), "\n".join(seen), Text(verdict.verdict, STYLES[verdict.verdict])))
    console.print()
    console.print(_verdicts(rows, console.width))
    counts = {name: sum(verdict.verdict == name for verdict in verdicts) for name in STYLES}
    line = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.print(Padding(Text(line, "bold red" if counts["missed"] else ""), (0, 1)))


def _verdicts(rows: list[tuple[str, str, str, Text]], width: int) -> Table:
    """A line each, or below its target where the line has no room for that."""
    columns = {
        "wanted": [Text(wanted) for _, wanted, _, _ in rows],
        "seen": [Text(seen) for _, _, seen, _ in rows],
        "verdict": [verdict for _, _, _, verdict in rows],
    }
    is_wide = room(columns, width) >= NARROWEST_TARGET
    table = new_table(right=columns, folded=("target",)) if is_wide else Table.grid(padding=(0, 2, 1, 1))
    for name, wanted, seen, verdict in rows:
        if is_wide:
            table.add_row(name, wanted, seen, verdict)
        else:
            numbers = "; ".join(
                f"{limit}: {value}" for limit, value in zip(wanted.split("\n"), seen.split("\n"), strict=True)
            )
            table.add_row(Text.assemble(f"{name}\n{numbers}, ", verdict))
    return table


def _title(result: Result, measured: Measured) -> str:
    case, about, layers = result.case(measured), result.about(measured), plural(measured.layers, "layer")
    shapes: dict[str, Any] = {"moe": MOE_SHAPES, "mla": MLA_SHAPES}
    known = shapes.get(result.suite, {}).get(result.shape)
    shape = f"{result.shape}{f' ({known})' if known else ''}, {result.dtype}"
    if result.suite == "moe":
        return f"moe: {shape}, {about}"
    if case is None:
        return f"{result.suite}: {shape}, {layers}, {about}"
    return f"mla {case.part}: {shape}\n{about}{f', {layers}' if case.part == 'step' else ''}"


def _table(result: Result, measured: Measured, width: int) -> tuple[Table, list[str]]:
    """The table, and the columns that it has no room for."""
    columns = (_memory_columns if result.suite == "memory" else _time_columns)(result, measured)
    peers = [row.contender for row in measured.rows if not row.is_ours]
    dropped = drop_to_fit(columns, width, DISPENSABLE, max(map(len, peers), default=0))
    names = [
        Text(wrap(row.contender, room(columns, width)), "bold")
        if row.is_ours
        else Text(wrap(row.contender, room(columns, width)))
        for row in measured.rows
    ]
    header = "experts\n" if result.suite == "moe" else "cache\n"
    return table_of(header, names, columns, ends=(len(peers) - 1,)), dropped


def _time_columns(result: Result, measured: Measured) -> Columns:
    rows, is_moe = measured.rows, result.suite == "moe"
    times = {
        "mla": "× stock\n",
        "host": "× Dyna-\nmicCache",
        "moe": f"×\n{measured.base}" if measured.base else "× base\n",
    }
    unit, unit_name = _unit(rows)
    plain = next((row.held_bytes for row in rows if row.held_bytes), 0) if result.suite in ("mla", "moe") else 0
    columns = {
        "median\nms": [_main(row, row.p50_ms and digits(row.p50_ms)) for row in rows],
        SPREAD: [_cell(row.p20_ms and f"{digits(row.p20_ms)}–{digits(row.p80_ms or 0)}", "dim") for row in rows],
        times.get(result.suite, "× best\npeer"): [_speedup(row) for row in rows],
        "µs more\na layer": [_cell(_more(row, measured)) for row in rows] if result.suite == "host" else [_cell(None)],
        "first\ntoken ms": [_cell(row.first_ms and digits(row.first_ms)) for row in rows],
        "× with-\nout LoRA": [_cell(row.lora_ratio and digits(row.lora_ratio)) for row in rows],
        "× its\nfloor": [_cell(row.floor_ratio and digits(row.floor_ratio)) for row in rows],
        f"held\n{unit_name}": [_bytes(row.held_bytes, unit) for row in rows],
        "of\nplain" if is_moe else SHARE: [_share(row, plain) for row in rows],
        TO_OWN: [_error(row.error_twin) for row in rows],
        "error\nto fp32" if is_moe else "error\nto full": [_error(row.error_full) for row in rows],
        "logits'\nerror": [_error(row.error_logits) for row in rows],
    }
    optional = ("µs more", "first", "× with-", "× its", "of", "error", "logits'")
    return {
        header: cells
        for header, cells in columns.items()
        if not header.startswith(optional) or any(cell.plain != "-" for cell in cells)
    }


def _memory_columns(result: Result, measured: Measured) -> Columns:
    rows, layers = measured.rows, result.model_layers
    unit, unit_name = _unit(rows)
    whole, whole_name = _unit(rows, layers)
    full = next((row.held_bytes for row in rows if row.contender == "DynamicCache"), None) or 0
    tokens = measured.batch * measured.context
    return {
        f"held\n{unit_name}": [_main(row, _bytes(row.held_bytes, unit)) for row in rows],
        SHARE: [_share(row, full) for row in rows],
        "bytes a\ntoken": [_cell(row.held_bytes and f"{row.held_bytes / tokens:,.0f}") for row in rows],
        f"alloc\n{unit_name}": [_bytes(row.allocated_bytes, unit) for row in rows],
        f"peak\n{unit_name}": [_bytes(row.peak_bytes, unit) for row in rows],
        f"× {layers}\n{whole_name}": [_bytes(row.held_bytes and row.held_bytes * layers, whole) for row in rows],
    }


def _more(row: Row, measured: Measured) -> str | None:
    """The time of a layer above that of the same with the base's cache."""
    base = measured.row(measured.base or "")
    if base is None or row.p50_ms is None or base.p50_ms is None or row is base:
        return None
    return f"{1e3 * (row.p50_ms - base.p50_ms) / measured.layers:+.0f}"


def _main(row: Row, shown: object) -> Text:
    """A row's first figure, or what became of it."""
    if row.status != "ok":
        return Text(row.status, "bold red" if row.status == "wrong" else "dim")
    return _cell(shown)


def _cell(shown: object, style: str = "") -> Text:
    return Text(str(shown), style) if shown else Text("-", "dim")


def _error(error: float | None) -> Text:
    return _cell(None if error is None else f"{error:.1e}")


def _speedup(row: Row) -> Text:
    if row.speedup is None:
        return _cell(None)
    style = "green" if row.speedup >= 1 else "yellow" if row.speedup >= BEARABLE_SPEEDUP else "red"
    return Text(f"{row.speedup:.2f}", style if row.is_ours else "")


def _bytes(value: float | None, unit: float) -> Text:
    return _cell(None if value is None else digits(value / unit))


def _share(row: Row, whole: int) -> Text:
    return _cell(row.held_bytes and whole and f"{row.held_bytes / whole:.3f}")


def _unit(rows: list[Row], times: int = 1) -> tuple[float, str]:
    return unit_of(min((row.held_bytes * times for row in rows if row.held_bytes), default=0), UNITS, LEAST_UNITS)
