"""What ``hfkv doctor`` shows: three tables, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.cli.tables import new_table, wrap

if TYPE_CHECKING:
    from hfkv.cli.doctor.layers import ModelReport
    from hfkv.cli.doctor.machine import Item
    from hfkv.cli.doctor.report import DoctorReport
    from hfkv.kernels.selftest.inputs import HeadShape
    from hfkv.kernels.selftest.suite import Check

# Columns for a config, and for the indices of a group's layers, before they are wrapped.
WIDEST_CACHE, WIDEST_LAYERS = 24, 14
# The same for any other column that gets the room it asks for. All of a table leave some to the rest of 80.
WIDEST = 14
# The worse, the later.
STYLES = {"not tested": "dim", "right": "green", "raised": "bold red", "wrong": "bold red"}
# Failures told one by one; the JSON has all of them.
MOST_FAILURES = 12


def show(report: DoctorReport, console: Console) -> None:
    """Prints a report, at the console's width."""
    _title(console, "Installed")
    console.print(Padding(_installed(report.installed), (0, 1)))
    model = report.model
    _title(console, f"Kernels for {model.name} ({model.model_type}), {model.kv}, {report.dtype}, on {report.device}")
    console.print(_layers(model))
    for note in model.notes:
        console.print(Padding(Text(f"{note[:1].upper()}{note[1:]}.", "yellow"), (0, 1)))
    _title(console, f"Self-test on {report.device}, {report.dtype}")
    console.print(_checks(report.checks))
    notes = dict.fromkeys(f"{c.kernel} ({c.what}): {c.note}" for c in report.checks if c.outcome == "not tested")
    for note in notes:
        console.print(Padding(Text(f"Not tested: {note}.", "dim"), (0, 1)))
    console.print(Padding(_verdict(report), (1, 1, 0, 1)))


def _title(console: Console, text: str) -> None:
    console.print(Padding(Text(text, "bold"), (1, 1, 0, 1)))


def _installed(items: list[Item]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    names = [Text(item.name, "cyan") for item in items]
    _add_column(table, "", names)
    for header in ("found", "note"):  # a grid does not show them
        table.add_column(header, overflow="fold")
    for name, item in zip(names, items, strict=True):
        found = Text("-", "dim") if item.found is None else Text(item.found)
        table.add_row(name, found, Text(item.note, "yellow" if item.is_odd else "dim"))
    return table


def _add_column(table: Table, header: str, cells: list[Text], widest: int = WIDEST, **options: Any) -> None:
    """A column as wide as its longest line, which other columns give way to; what is longer than `widest` is folded."""
    lines = [line for cell in cells for line in cell.plain.split("\n")]
    width = min(max(map(len, (header, *lines))), widest)
    table.add_column(header, width=width, overflow="fold", **options)


def _layers(model: ModelReport) -> Table:
    table = new_table()
    rows, ends = [], []
    for group in model.groups:
        layers, cache = _wrapped_ranges(group.layers), _wrapped_cache(group.cache)
        if group.heads is not None:
            cache += f"\n{_dims(group.heads)}"
        for index, use in enumerate(group.uses):
            group_cells = ("", "") if index else (layers, cache)
            cells = (*map(Text, (*group_cells, use.name)), Text(use.kernel, "bold"), Text(use.why, "dim"))
            rows.append(cells)
        ends.append(len(rows))
    columns = list(zip(*rows, strict=True))
    for header, cells in zip(("layers", "cache", "for", "kernel"), columns, strict=False):
        _add_column(table, header, list(cells), WIDEST_CACHE if header == "cache" else WIDEST)
    table.add_column("why", overflow="fold")
    for count, cells in enumerate(rows, start=1):
        table.add_row(*cells, end_section=count in ends[:-1])
    return table


def _dims(heads: HeadShape) -> str:
    key_dim, value_dim = heads[:2]
    if heads.is_latent:
        return f"latent {key_dim}, rotary {value_dim}"
    return f"head dim {key_dim}" if key_dim == value_dim else f"head dims {key_dim}, {value_dim}"


def _wrapped_cache(cache: str) -> str:
    words, *others = cache.split(", ")
    return "\n".join([wrap(words, WIDEST_CACHE), *others])


def _wrapped_ranges(layers: list[int]) -> str:
    lines = [""]
    for part in ranges(layers).split(", "):
        if lines[-1] and len(lines[-1]) + len(part) + 2 > WIDEST_LAYERS:
            lines.append("")
        lines[-1] += f", {part}" if lines[-1] else part
    return ",\n".join(lines)


def ranges(indices: list[int]) -> str:
    """``"0-4, 6"`` of ascending indices."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _checks(checks: list[Check]) -> Table:
    table = new_table()
    rows = []
    for alike in _alike(checks):
        worst = max((c for c in alike if c.error is not None), key=_share, default=None)
        outcomes = [outcome for outcome in STYLES if any(check.outcome == outcome for check in alike)]
        counts = "\n".join(
            f"{sum(c.outcome == outcome for c in alike)} {outcome}" if len(outcomes) > 1 else outcome
            for outcome in outcomes
        )
        rows.append(
            (
                Text(alike[0].kernel or "-", "bold"),
                Text(", ".join(dict.fromkeys(check.what for check in alike))),
                Text(", ".join(dict.fromkeys(check.codec for check in alike))),
                Text(str(len(alike))),
                Text("-", "dim") if worst is None else Text(f"{worst.error:.1e}"),
                Text("-", "dim") if worst is None else Text(f"{worst.allowed:.1e}"),
                Text(counts, STYLES[max(outcomes, key=list(STYLES).index)]),
            )
        )
    headers = ("kernel", "for", "tokens", "checks", "error", "allowed", "outcome")
    for index, header in enumerate(headers):
        if header in ("for", "tokens"):
            table.add_column(header, overflow="fold")
        else:
            cells = [row[index] for row in rows]
            _add_column(table, header, cells, justify="left" if header == "kernel" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _share(check: Check) -> float:
    """How much of the error that is allowed there is."""
    assert check.error is not None
    assert check.allowed is not None
    return check.error / check.allowed


def _alike(checks: list[Check]) -> Iterable[list[Check]]:
    """The checks of one kernel and codec, together; and those that were not made for the same reason."""
    groups: dict[tuple[str | None, ...], list[Check]] = {}
    for check in checks:
        use = "attention" if check.what in ("decode", "prefill") else check.what
        what = check.note if check.outcome == "not tested" else check.codec
        groups.setdefault((check.kernel, use, what), []).append(check)
    return groups.values()


def _verdict(report: DoctorReport) -> Text:
    num_tested = sum(check.outcome != "not tested" for check in report.checks)
    if not report.failures:
        return Text(f"All {num_tested} checks are right ({report.seconds:.1f} s).", "green")
    text = Text()
    for check in report.failures[:MOST_FAILURES]:
        where = f"{check.kernel or 'no kernel'}, {check.what} of {check.num_tokens}, {check.codec}, {check.store}"
        note = (check.note or "").strip().splitlines()
        text.append(f"{check.outcome}: {where}, {check.setting}: {note[0] if note else 'no message'}\n", "red")
    left = len(report.failures) - MOST_FAILURES
    if left > 0:
        text.append(f"and {left} more\n", "red")
    text.append(
        f"{len(report.failures)} of {num_tested} checks failed: results on this device cannot be trusted. Please "
        "report it with the file that hfkv doctor --json doctor.json writes.",
        "bold red",
    )
    return text
