"""What ``hfkv plan`` shows: the weights, the caches beside them, what to choose, and where the numbers come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.cli.eval_screen import SPACE, wrap

if TYPE_CHECKING:
    from hfkv.planning.plan import MemoryPlan, PlannedCache

GIB = 2**30
HOST, TOTAL = "host\nGiB", "with\nweights"
# Left out, in this order, where they would leave less than so many columns for the cache.
DISPENSABLE = (TOTAL, HOST)
NARROWEST_KV = 13


def show(plan: MemoryPlan, console: Console) -> None:
    """Prints a plan, at the console's width."""
    rows = f"{plan.batch} row{'s' if plan.batch != 1 else ''} of {plan.context:,} tokens"
    _title(console, f"{plan.model}: {rows} in {_gib(plan.memory_bytes)} GiB ({plan.memory_source}), {plan.device}")
    console.print(_weights(plan))
    _title(console, f"Caches beside {plan.chosen} weights")
    console.print(_caches(plan, console.width))
    console.print(Padding(_recommendation(plan), (0, 1, 1, 1)))
    console.print(Padding(_caption(plan), (0, 1)))


def _title(console: Console, text: str) -> None:
    console.print(Padding(Text(text, "bold"), (1, 1, 0, 1)))


def _weights(plan: MemoryPlan) -> Table:
    table = _table("weights\n")
    for header in ("take\nGiB", "leave for\nKV, GiB", "a step\nreads, GiB"):
        table.add_column(header, justify="right", no_wrap=True)
    for weights in plan.weights:
        left = plan.memory_bytes - plan.overhead_bytes - plan.activation_bytes - weights.nbytes
        cell = Text(_gib(left)) if left > 0 else Text("too big", "red")
        table.add_row(Text(weights.name, "bold"), _gib(weights.nbytes), cell, _gib(weights.read(plan.batch)))
    return table


def _caches(plan: MemoryPlan, width: int) -> Table:
    columns = _columns(plan)
    for header in DISPENSABLE:
        if header in columns and _room(columns, width) < NARROWEST_KV:
            del columns[header]
    table = _table("cache\n")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for index, cache in enumerate(plan.caches):
        name = Text(wrap(cache.kv, max(_room(columns, width), NARROWEST_KV)), "bold")
        table.add_row(name, *(cells[index] for cells in columns.values()))
    return table


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column(first, no_wrap=True)
    return table


def _columns(plan: MemoryPlan) -> dict[str, list[Text]]:
    """The cells of every column by its header, two lines."""
    caches = plan.caches
    columns = {"KV\nGiB": [Text(_gib(cache.kv_bytes)) for cache in caches]}
    if any(cache.host_bytes for cache in caches):
        columns[HOST] = [Text(_gib(cache.host_bytes)) if cache.host_bytes else Text("-", "dim") for cache in caches]
    columns[TOTAL] = [Text(_gib(cache.total_bytes)) for cache in caches]
    for index, weights in enumerate(plan.weights):
        header = f"{'fits with' if index == 0 else ''}\n{weights.name}"
        columns[header] = [Text("yes", "green") if cache.fits[weights.name] else Text("no", "red") for cache in caches]
    columns["longest\ncontext"] = [_context(plan, cache) for cache in caches]
    columns["most\nrows"] = [_count(cache.largest_batch) for cache in caches]
    columns["floor\nms"] = [Text(_digits(cache.floor_ms)) for cache in caches]
    return columns


def _context(plan: MemoryPlan, cache: PlannedCache) -> Text:
    cell = _count(cache.largest_context)
    return cell.append("*") if cache.largest_context == plan.most_context else cell


def _count(count: int) -> Text:
    return Text(f"{count:,}") if count else Text("-", "dim")


def _room(columns: dict[str, list[Text]], width: int) -> int:
    """What the other columns leave for a cache's name."""
    texts = [[*header.split("\n"), *(cell.plain for cell in cells)] for header, cells in columns.items()]
    return width - SPACE - sum(max(map(len, column)) + SPACE for column in texts)


def _recommendation(plan: MemoryPlan) -> Text:
    best = plan.recommended
    if best is not None:
        text = Text(f"Take {best.weights} weights and kv={best.kv!r}", "bold green")
        return text.append(f": {best.costs}.", "")
    wanted = min(plan.caches, key=lambda cache: cache.total_bytes)
    text = Text("Nothing of this fits", "bold red")
    if wanted.largest_context:
        text.append(f": with {plan.chosen} weights and kv={wanted.kv!r}, {wanted.largest_context:,} tokens would.", "")
    elif wanted.largest_batch:
        text.append(f": with {plan.chosen} weights and kv={wanted.kv!r}, a batch of {wanted.largest_batch} would.", "")
    else:
        short = wanted.total_bytes + plan.overhead_bytes - plan.memory_bytes
        text.append(f": {plan.chosen} weights and kv={wanted.kv!r} lack {_gib(short)} GiB.", "")
    return text


def _caption(plan: MemoryPlan) -> Table:
    from hfkv.planning.footprint import PREFILL_CHUNK

    speeds = plan.speeds
    beside = f"{_gib(plan.activation_bytes)} GiB of activations (prompts read {PREFILL_CHUNK:,} tokens at a time:"
    beside += f" prefill_chunk_size={PREFILL_CHUNK})"
    if plan.overhead_bytes:
        beside += f" and {_gib(plan.overhead_bytes)} GiB of the device's own"
    notes = {
        "KV": "allocated while decoding with the length known; fits counts the most, while the prompt is read",
        "beside": beside,
        "floor": f"reading weights and KV at {speeds.bandwidth / 1e9:,.0f} GB/s ({speeds.bandwidth_source})",
    }
    if any(cache.host_bytes for cache in plan.caches):
        notes["floor"] += f", offloaded KV at {speeds.bus / 1e9:,.0f} GB/s ({speeds.bus_source})"
    if any(cache.largest_context == plan.most_context for cache in plan.caches):
        notes["*"] = "the model's most"
    if plan.dtype != "bfloat16":
        notes["dtype"] = f"{plan.dtype} for keys, values and what is not quantised"
    caption = Table.grid(padding=(0, 2, 0, 0))
    for name, note in notes.items():
        caption.add_row(Text(name, "cyan", no_wrap=True), Text(note, "dim"))
    for note in plan.notes:
        caption.add_row(Text("note", "yellow", no_wrap=True), Text(note, "yellow"))
    return caption


def _gib(size: int) -> str:
    amount = size / GIB
    return f"{amount:,.1f}" if abs(amount) >= 9.95 else f"{amount:.2f}" if abs(amount) >= 0.095 else f"{amount:.2g}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"
