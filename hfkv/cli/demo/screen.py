"""What ``hfkv demo`` shows: the text in a panel, the numbers in a table, and how they were measured."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hfkv.cli.demo.runs import DemoReport, DemoRow
from hfkv.cli.tables import NARROWEST, drop_to_fit, new_table, notes_grid, room, table_of, wider, wrap

PROMPT_LINES = 8
# From this width on there is room for the caches' classes and for bars.
WIDE = 116
ALLOCATED, LOSS = "KV\nKiB", "loss\nnats/B"
BAR_WIDTH = 12
# A loss this much higher, in %, is coloured as good or as bearable.
GOOD_CHANGE, BEARABLE_CHANGE = 0.5, 5.0


def show(report: DemoReport, console: Console) -> None:
    """Prints a report, at the console's width."""
    console.print()
    console.print(_panel(report))
    table, dropped = _table(report, console.width)
    console.print(table)
    console.print(Padding(_caption(report, dropped), (0, 1)))


def _panel(report: DemoReport) -> Panel:
    end = "".join(report.prompt.splitlines(keepends=True)[-PROMPT_LINES:])
    body = Text.assemble((end, "dim"), (report.text.rstrip(), "bold green"))
    return Panel(
        body,
        title="the end of the prompt, and [bold green]the model's words[/]",
        subtitle=f"under {report.rows[0].cache}",
        title_align="left",
        subtitle_align="right",
        border_style="cyan",
        padding=(0, 1),
    )


def _table(report: DemoReport, width: int) -> tuple[Table, list[str]]:
    """The table, and the columns that it has no room for."""
    rows = report.rows
    columns = {
        ALLOCATED: [Text(f"{row.allocated_bytes / 1024:,.0f}") for row in rows],
        "held\nKiB": [Text(f"{row.held_bytes / 1024:,.0f}") for row in rows],
        "ratio\n": [Text(f"{row.held_ratio:.3f}") for row in rows],
        "decode\ntokens/s": [Text(f"{row.tokens_per_second:,.0f}") for row in rows],
        f"same, of\n{rows[0].num_new_tokens} tokens": [_same_tokens(row) for row in rows],
        LOSS: [Text(f"{row.nats_per_byte:.4f}") for row in rows],
        "change\n%": [_change(row) for row in rows],
    }
    ends = [index for index, row in enumerate(rows) if row.kv is None]
    if width < WIDE:
        dropped = drop_to_fit(columns, width, (LOSS, ALLOCATED), NARROWEST)
        names = [Text(wrap(row.kv or row.cache, room(columns, width)), "bold") for row in rows]
        return table_of("cache\n", names, columns, ends), dropped
    table = new_table("cache\n", "kv\n", "held, of\nDynamicCache", right=columns)
    for index, row in enumerate(rows):
        numbers = (cells[index] for cells in columns.values())
        label = (Text(row.cache), Text(row.kv or "-", "bold"), _bar(row.held_ratio))
        table.add_row(*label, *numbers, end_section=index in ends)
    return table, []


def _bar(ratio: float) -> Text:
    eighths = max(round(min(ratio, 1.0) * BAR_WIDTH * 8), 1)
    full, rest = divmod(eighths, 8)
    return Text("█" * full + " ▏▎▍▌▋▊▉"[rest].strip(), "cyan")


def _same_tokens(row: DemoRow) -> Text:
    if row.kv is None:
        return Text("-", "dim")
    if row.num_same_tokens == row.num_new_tokens:
        return Text("all", "green")
    return Text(f"first {row.num_same_tokens}", "yellow")


def _change(row: DemoRow) -> Text:
    if row.kv is None:
        return Text("-", "dim")
    change = row.loss_change_percent
    style = "green" if change <= GOOD_CHANGE else "yellow" if change <= BEARABLE_CHANGE else "red"
    return Text(f"{change:+.2f}", style)


def _caption(report: DemoReport, dropped: list[str]) -> Table:
    setting, machine = report.setting, report.machine
    rounds = "one run" if setting.rounds == 1 else f"the best of {setting.rounds} runs"
    notes = {
        "where": f"{machine['processor']}, {machine['device']}, {machine['threads']} thread"
        f"{'s' if machine['threads'] != 1 else ''}, {machine['dtype']}; hfkv {machine['hfkv']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}",
        "run": f"one row, {setting.prompt_bytes:,} prompt bytes and {setting.max_new_tokens:,} new ones, greedy; "
        "a token is a byte",
        "KV, held": "bytes allocated at the end, and bytes of the tokens kept; ratio: held to "
        f"{report.rows[0].cache}'s",
        "decode": f"without the prefill; {rounds} that took turns in one process. The model is tiny: no measure of "
        "a large one's speed",
        "same": f"new tokens before the first that differs from {report.rows[0].cache}'s",
        "loss": f"{setting.loss_bytes:,} bytes of held-out Python source in blocks of "
        f"{min(setting.loss_context, setting.loss_bytes):,}; change from {report.rows[0].cache}'s. "
        "16-bit sums in another order differ in their last bits, lossless or not",
    }
    return notes_grid(notes | wider(dropped))
