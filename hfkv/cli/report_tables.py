"""The tables of what hfkv reports from Python: ``cache.memory()``, ``handle.moe``, traces and routing statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from hfkv.cache.memory import CacheMemory
from hfkv.cli.tables import new_table
from hfkv.experts.offload.eviction import Eviction, eviction_name
from hfkv.experts.offload.trace import ExpertTrace, replay
from hfkv.experts.report import MoEReport
from hfkv.policy.units import about_bytes
from hfkv.sparse_moe.stats import LayerRouting, RoutingStats


def cache_memory_table(memory: CacheMemory) -> Table:
    """See `CacheMemory.table`."""
    table = new_table("layers", "plane", "device", right=("held", "allocated"))
    for layers, row in memory.merged():
        heads = f" of heads {', '.join(map(str, row.heads))}" if row.heads else ""
        sizes = about_bytes(row.held_bytes), about_bytes(row.allocated_bytes)
        table.add_row(layers, f"{row.part} {row.plane}{heads}", str(row.device), *sizes)
    table.add_section()
    for device, (allocated, held) in memory.by_device().items():
        table.add_row("all", "", device, about_bytes(held), about_bytes(allocated), style="bold")
    return table


def experts_table(report: MoEReport) -> Table:
    """What became of each layer's experts."""
    table = Table(title="experts")
    for column in ("module", "class", "experts", "form", "bytes before", "bytes now", "why"):
        table.add_column(column, justify="right" if column.startswith(("experts", "bytes")) else "left")
    for swap in report.swapped:
        sizes = about_bytes(swap.bytes_before), about_bytes(swap.bytes_after)
        table.add_row(swap.name, swap.kind, str(swap.num_experts), swap.form, *sizes, swap.why)
    for name, why in report.kept.items():
        table.add_row(name, "", "", "as it was", "", "", why)
    table.add_section()
    table.add_row("all", "", "", "", about_bytes(report.bytes_before), about_bytes(report.bytes_after), "")
    return table


def trace_table(trace: ExpertTrace) -> Table:
    """Hits, misses and bytes moved of each layer."""
    table = Table(title="offloaded experts")
    for column in ("layer", "experts", "slots", "hits", "misses", "hit rate", "moved"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, layer in trace.layers.items():
        table.add_row(name, str(layer.num_experts), str(layer.num_slots), *_counted(trace, name))
    table.add_section()
    table.add_row("all", "", "", *_counted(trace, None))
    return table


def _counted(trace: ExpertTrace, name: str | None) -> list[str]:
    counts = trace.counts(name)
    moved = about_bytes(trace.bytes_moved(name))
    return [f"{counts.hits:,}", f"{counts.misses:,}", f"{trace.hit_rate(name):.1%}", moved]


def replay_table(
    trace: ExpertTrace, num_slots: Sequence[int], evictions: Sequence[str | Callable[[], Eviction]]
) -> Table:
    """See `hfkv.experts.offload.compare`."""
    forwards = max((len(layer.forwards) for layer in trace.layers.values()), default=0)
    table = Table(title=f"{forwards:,} recorded forwards, replayed: hit rate, bytes moved a forward")
    table.add_column("slots", justify="right")
    for eviction in evictions:
        table.add_column(eviction_name(eviction), justify="right")
    for slots in num_slots:
        replays = [replay(trace, eviction, slots) for eviction in evictions]
        words = (f"{each.hit_rate():.1%}  {about_bytes(each.bytes_moved // forwards)}" for each in replays)
        table.add_row(str(slots), *words)
    return table


def routing_table(stats: RoutingStats) -> Table:
    """How the tokens of each layer were spread over its experts."""
    table = Table(title="routing", caption=stats.verdict)
    for column in ("layer", "tokens", "load of each expert, %", "entropy", "max / mean", "dead", "dropped", ""):
        table.add_column(column, justify="left" if column in ("layer", "") else "right")
    for layer in stats.layers:
        table.add_row(
            layer.name,
            f"{layer.num_tokens:,}",
            _loads(layer),
            f"{layer.entropy:.3f}",
            f"{layer.imbalance:.2f}",
            f"{len(layer.dead)}" if layer.dead else "-",
            f"{layer.num_dropped:,}" if layer.num_dropped else "-",
            "COLLAPSED" if layer.collapsed else "",
        )
    return table


def _loads(layer: LayerRouting) -> str:
    """The loads in per cent; of many experts the least, the median and the most."""
    percents = [f"{100 * share:.0f}" for share in layer.load]
    if len(percents) <= 16:
        return " ".join(percents)
    ordered = sorted(layer.load)
    least, median, most = (100 * ordered[place] for place in (0, len(ordered) // 2, -1))
    return f"{least:.2f} … {median:.2f} … {most:.2f}"
