"""What ``hfkv eval`` shows: the numbers in a table, and how they were measured."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.cli.demo.screen import BEARABLE_CHANGE, GOOD_CHANGE
from hfkv.cli.eval.runs import EvalReport, EvalRow
from hfkv.cli.tables import Columns, drop_to_fit, notes_grid, room, table_of, unit_of, wider, wrap

PERPLEXITY, ALLOCATED = "ppl\n", "alloc\n"
# Left out, in this order, where they would leave less than so many columns for the config.
DISPENSABLE = (ALLOCATED, PERPLEXITY)
NARROWEST_KV = 13
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
# A unit is taken for the table where the smallest cache holds so many of it.
LEAST_UNITS = 10


def show(report: EvalReport, console: Console) -> None:
    """Prints a report, at the console's width."""
    console.print()
    table, dropped = _table(report, console.width)
    console.print(table)
    console.print(Padding(_caption(report, dropped), (0, 1)))


def _table(report: EvalReport, width: int) -> tuple[Table, list[str]]:
    """The table, and the columns that it has no room for."""
    columns = _columns(report)
    dropped = drop_to_fit(columns, width, DISPENSABLE, NARROWEST_KV)
    names = [Text(wrap(row.text.kv, room(columns, width)), "bold") for row in report.rows]
    return table_of("kv\n", names, columns, ends=(0,)), dropped


def _columns(report: EvalReport) -> Columns:
    unit, unit_name = unit_of(min(row.text.held_bytes for row in report.rows), UNITS, LEAST_UNITS)
    texts = [row.text for row in report.rows]
    columns = {
        "loss\nnats": [Text(f"{text.nats:.4f}") for text in texts],
        PERPLEXITY: [Text(_number(text.perplexity)) for text in texts],
        "change\n%": [_change(text.perplexity_change_percent) for text in texts],
        "KL\nnats": [Text(f"{text.kl:.4f}") for text in texts],
        "top-1\n%": [Text(f"{100 * text.top1_agreement:.2f}") for text in texts],
        "attn\ncosine": [Text(f"{text.attention_similarity:.4f}") for text in texts],
        f"held\n{unit_name}": [Text(f"{text.held_bytes / unit:,.0f}") for text in texts],
        ALLOCATED: [Text(f"{text.allocated_bytes / unit:,.0f}") for text in texts],
        "ratio\n": [Text(f"{text.held_ratio:.3f}") for text in texts],
    }
    for header in ("change\n%", "KL\nnats", "top-1\n%", "attn\ncosine"):
        columns[header][0] = Text("-", "dim")  # the full cache against itself
    if report.setting.lengths:
        columns["keys\n%"] = [Text(_keys(row)) for row in report.rows]
    return columns


def _number(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1000 else f"{perplexity:.2g}"


def _keys(row: EvalRow) -> str:
    return "-" if row.keys_found is None else f"{100 * row.keys_found:.0f}"


def _change(percent: float) -> Text:
    style = "green" if percent <= GOOD_CHANGE else "yellow" if percent <= BEARABLE_CHANGE else "red"
    return Text(f"{percent:+.2f}" if abs(percent) < 1000 else f"{percent:+.1e}", style)


def _caption(report: EvalReport, dropped: list[str]) -> Table:
    setting, machine = report.setting, report.machine
    block = report.num_tokens if setting.context is None else min(setting.context, report.num_tokens)
    read = "as one stream" if setting.context is None else f"in blocks of {block:,}"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    notes = {
        "model": f"{report.model}, {machine['dtype']}, on {report.text}",
        "where": f"{machine['processor']}, {machine['device']}, {threads}; hfkv {machine['hfkv']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}; {report.seconds:.0f} s",
        "text": f"{report.num_tokens:,} tokens {read}, {setting.chunk:,} a forward; loss in nats a token",
        "change": "of the perplexity, from the full cache's",
        "KL": "KL(full || this) of the next token's distribution; top-1: both would choose the same token",
        "attn": "cosine of the attention layers' outputs with the full cache's, mean over tokens and layers",
        "held": f"bytes of the tokens kept after {block:,}, and allocated; ratio: held to the full cache's",
    }
    if setting.lengths:
        lengths = ", ".join(f"{length:,}" for length in setting.lengths)
        num_prompts = len(setting.lengths) * len(report.depths) * setting.trials
        depths = f"{len(report.depths)} depth{'s' if len(report.depths) != 1 else ''}"
        notes["keys"] = f"{num_prompts:,} pass keys in prompts of {lengths} tokens, {depths}, {setting.trials} each"
    for name, found in report.found.items():
        notes[name.partition("+")[0]] = str(found)
    if report.max_positions is not None and report.longest > report.max_positions:
        notes["beware"] = (
            f"the model was made for {report.max_positions:,} tokens and read up to {report.longest:,}: the full "
            "cache is no standard there"
        )
    return notes_grid(notes | wider(dropped))
