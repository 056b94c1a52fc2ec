"""What a plan shows, printed or by ``hfkv plan``: weights, caches, what to choose, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.cli.tables import (
    NARROWEST,
    TEXT_WIDTH,
    Columns,
    drop_to_fit,
    new_table,
    notes_grid,
    pieces,
    room,
    table_of,
    unit_of,
    wider,
    wrap,
)
from hfkv.planning.fit import MOST_TOKENS
from hfkv.policy.units import about_bytes

if TYPE_CHECKING:
    from hfkv.planning.plan import MemoryPlan, PlannedCache

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
# Columns left out, in this order and by what they begin with, where they would leave less than so many columns for the
# cache: what a reader is told that wider terminals show.
DISPENSABLE = {"with\nweights": "KV with weights", "host": "host", "floor": "floor", "most": "most rows"}
DISPENSABLE |= {"longest": "longest context"}
NARROWEST_KV = 13


def show(plan: MemoryPlan, console: Console) -> None:
    """Prints a plan, at the console's width."""
    for part in _parts(plan, console.width):
        console.print(part)


def tables(plan: MemoryPlan) -> Group:
    """The same, for rich to print."""
    return Group(*_parts(plan, TEXT_WIDTH))


def _parts(plan: MemoryPlan, width: int) -> list[RenderableType]:
    rows = f"{plan.batch} row{'s' if plan.batch != 1 else ''} of {plan.context:,} tokens"
    memory = f"{about_bytes(plan.memory_bytes)} ({plan.memory_source})"
    caches, dropped = _caches(plan, width)
    return [
        _title(f"{plan.model}: {rows} in {memory}, {plan.device}"),
        _weights(plan),
        _title(f"Caches beside {plan.chosen} weights"),
        caches,
        Padding(_recommendation(plan), (0, 1, 1, 1)),
        Padding(_caption(plan, dropped), (0, 1)),
    ]


def _title(text: str) -> Padding:
    return Padding(Text(text, "bold"), (1, 1, 0, 1))


def _weights(plan: MemoryPlan) -> Table:
    beside = plan.overhead_bytes + plan.activation_bytes
    left = [plan.memory_bytes - beside - weights.nbytes for weights in plan.weights]
    takes, leaves = _Sizes(weights.nbytes for weights in plan.weights), _Sizes(left)
    reads = _Sizes(weights.read(plan.batch) for weights in plan.weights)
    headers = (f"take\n{takes.unit}", f"leave for\nKV, {leaves.unit}", f"a step\nreads, {reads.unit}")
    table = new_table("weights\n", right=headers)
    for weights, rest in zip(plan.weights, left, strict=True):
        shown = Text(leaves.of(rest)) if rest > 0 else Text("too big", "red")
        table.add_row(Text(weights.name, "bold"), takes.of(weights.nbytes), shown, reads.of(weights.read(plan.batch)))
    return table


class _Sizes:
    """Sizes of a column, in the unit of its largest."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._unit, self.unit = unit_of(max(sizes, default=0), UNITS, least=0.0995)

    def of(self, size: int) -> str:
        amount = size / self._unit
        few = abs(amount) < 0.095
        return f"{amount:,.1f}" if abs(amount) >= 9.95 else f"{amount:.2g}" if few else f"{amount:.2f}"


def _caches(plan: MemoryPlan, width: int) -> tuple[Table, list[str]]:
    """The table, and the names of columns that it has no room for."""
    columns = _columns(plan)
    needed = max(NARROWEST_KV, *(len(piece) for cache in plan.caches for piece in pieces(cache.kv)))
    dropped = drop_to_fit(columns, width, DISPENSABLE, needed)
    names = [Text(wrap(cache.kv, max(room(columns, width), NARROWEST)), "bold") for cache in plan.caches]
    return table_of("cache\n", names, columns), [DISPENSABLE.get(start, start) for start in dropped]


def _columns(plan: MemoryPlan) -> Columns:
    caches = plan.caches
    kv, host = _Sizes(cache.kv_bytes for cache in caches), _Sizes(cache.host_bytes for cache in caches)
    total = _Sizes(cache.total_bytes for cache in caches)
    columns = {f"KV\n{kv.unit}": [Text(kv.of(cache.kv_bytes)) for cache in caches]}
    if any(cache.host_bytes for cache in caches):
        away = [Text(host.of(cache.host_bytes)) if cache.host_bytes else Text("-", "dim") for cache in caches]
        columns[f"host\n{host.unit}"] = away
    columns[f"with\nweights{'' if total.unit == kv.unit else ', ' + total.unit}"] = [
        Text(total.of(cache.total_bytes)) for cache in caches
    ]
    for index, weights in enumerate(plan.weights):
        header = f"{'fits with' if index == 0 else ''}\n{weights.name}"
        columns[header] = [Text("yes", "green") if cache.fits[weights.name] else Text("no", "red") for cache in caches]
    columns["longest\ncontext"] = [_context(plan, cache) for cache in caches]
    columns["most\nrows"] = [_count(cache.largest_batch) for cache in caches]
    floors = [cache.floor_ms for cache in caches]
    columns["floor\nms"] = [Text("-", "dim") if floor is None else Text(_digits(floor)) for floor in floors]
    return columns


def _context(plan: MemoryPlan, cache: PlannedCache) -> Text:
    if cache.largest_context >= MOST_TOKENS:
        return Text("any")
    cell = _count(cache.largest_context)
    return cell.append("*") if _is_models_most(plan, cache) else cell


def _is_models_most(plan: MemoryPlan, cache: PlannedCache) -> bool:
    return plan.context <= cache.largest_context == plan.most_context


def _count(count: int) -> Text:
    return Text(f"{count:,}") if count else Text("-", "dim")


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
        text.append(f": {plan.chosen} weights and kv={wanted.kv!r} lack {about_bytes(short)}.", "")
    return text


def _caption(plan: MemoryPlan, dropped: list[str]) -> Table:
    from hfkv.planning.footprint import PREFILL_CHUNK

    speeds = plan.speeds
    beside = f"{about_bytes(plan.activation_bytes)} of activations (prompts read {PREFILL_CHUNK:,} tokens at a time:"
    beside += f" prefill_chunk_size={PREFILL_CHUNK})"
    if plan.overhead_bytes:
        beside += f" and {about_bytes(plan.overhead_bytes)} of the device's own"
    notes = {
        "KV": "allocated while decoding with the length known; fits counts the most, while the prompt is read",
        "beside": beside,
    }
    if speeds.bandwidth is not None:
        notes["floor"] = f"reading weights and KV at {_rate(speeds.bandwidth)} ({speeds.bandwidth_source})"
    if speeds.bandwidth is not None and any(cache.host_bytes for cache in plan.caches):
        notes["floor"] += f", offloaded KV at {_rate(speeds.bus)} ({speeds.bus_source})"
    if any(_is_models_most(plan, cache) for cache in plan.caches):
        notes["*"] = "the model's most"
    if any(cache.largest_context >= MOST_TOKENS for cache in plan.caches):
        notes["any"] = "a context of any length: none that was tried is too long"
    notes |= wider(dropped)
    if plan.dtype != "bfloat16":
        notes["dtype"] = f"{plan.dtype} for keys, values and what is not quantised"
    caption = notes_grid(notes)
    for note in plan.notes:
        caption.add_row(Text("note", "yellow", no_wrap=True), Text(note, "yellow"))
    return caption


def _rate(rate: int) -> str:
    return f"{rate / 1e9:,.{0 if rate >= 1e10 else 2}f} GB/s"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"
