"""What a plan shows, printed or by ``hfkv plan``: weights, caches, what to choose, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hfkv.cli.tables import TEXT_WIDTH, new_table
from hfkv.planning.fit import MOST_TOKENS
from hfkv.policy.units import about_bytes

if TYPE_CHECKING:
    from hfkv.planning.plan import MemoryPlan, PlannedCache

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
SPACE = 2
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
    table = new_table("weights\n")
    beside = plan.overhead_bytes + plan.activation_bytes
    left = [plan.memory_bytes - beside - weights.nbytes for weights in plan.weights]
    takes, leaves = _Sizes(weights.nbytes for weights in plan.weights), _Sizes(left)
    reads = _Sizes(weights.read(plan.batch) for weights in plan.weights)
    for header in (f"take\n{takes.unit}", f"leave for\nKV, {leaves.unit}", f"a step\nreads, {reads.unit}"):
        table.add_column(header, justify="right", no_wrap=True)
    for weights, rest in zip(plan.weights, left, strict=True):
        shown = Text(leaves.of(rest)) if rest > 0 else Text("too big", "red")
        table.add_row(Text(weights.name, "bold"), takes.of(weights.nbytes), shown, reads.of(weights.read(plan.batch)))
    return table


class _Sizes:
    """Sizes of a column, in the unit of its largest."""

    def __init__(self, sizes: Iterable[int]) -> None:
        most = max(sizes, default=0)
        self.unit, self._unit = next((each for each in UNITS if most >= 0.0995 * each[1]), UNITS[-1])

    def of(self, size: int) -> str:
        amount = size / self._unit
        few = abs(amount) < 0.095
        return f"{amount:,.1f}" if abs(amount) >= 9.95 else f"{amount:.2g}" if few else f"{amount:.2f}"


def _caches(plan: MemoryPlan, width: int) -> tuple[Table, list[str]]:
    """The table, and the names of columns that it has no room for."""
    columns = _columns(plan)
    dropped = []
    needed = max(NARROWEST_KV, *(len(piece) for cache in plan.caches for piece in _pieces(cache.kv)))
    for start, name in DISPENSABLE.items():
        header = next((header for header in columns if header.startswith(start)), None)
        if header is not None and _room(columns, width) < needed:
            del columns[header]
            dropped.append(name)
    table = new_table("cache\n")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for index, cache in enumerate(plan.caches):
        label = Text(_wrap(cache.kv, max(_room(columns, width), needed)), "bold")
        table.add_row(label, *(cells[index] for cells in columns.values()))
    return table, dropped


def _pieces(kv: str) -> list[str]:
    first, *others = kv.split("+")
    return [first, *(f"+{word}" for word in others)]


def _wrap(kv: str, width: int) -> str:
    """A config in lines of up to `width` characters, cut before a plus."""
    lines = [""]
    for piece in _pieces(kv):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _columns(plan: MemoryPlan) -> dict[str, list[Text]]:
    """The cells of every column by its header, two lines."""
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
    if dropped:
        notes["more"] = f"wider terminals show: {', '.join(dropped)}"
    if plan.dtype != "bfloat16":
        notes["dtype"] = f"{plan.dtype} for keys, values and what is not quantised"
    caption = Table.grid(padding=(0, 2, 0, 0))
    for name, note in notes.items():
        caption.add_row(Text(name, "cyan", no_wrap=True), Text(note, "dim"))
    for note in plan.notes:
        caption.add_row(Text("note", "yellow", no_wrap=True), Text(note, "yellow"))
    return caption


def _rate(rate: int) -> str:
    return f"{rate / 1e9:,.{0 if rate >= 1e10 else 2}f} GB/s"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"
