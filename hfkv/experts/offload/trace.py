"""`ExpertTrace`: which experts were chosen and which were there, and what other policies would have done."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfkv.experts.offload.eviction import Eviction, eviction_name
from hfkv.experts.offload.slot_table import Counts, SlotTable
from hfkv.policy.ports import port

if TYPE_CHECKING:
    from rich.table import Table
else:
    Table = Any  # for typing.get_type_hints, without the import

FORMAT, VERSION = "hfkv-expert-trace", 1
# Forwards of each layer that a recording holds; a decode step of top-8 takes some 130 bytes.
KEEP = 4096
BELADY = "belady"


@dataclass(eq=False)
class LayerTrace:
    """The trace of one layer.

    Attributes:
        num_experts: E.
        num_slots: S.
        expert_bytes: bytes of one expert, both projections, as it travels.
        counts: hits and misses, which are always counted.
        forwards: the experts that each recorded forward chose, the oldest first.
    """

    num_experts: int
    num_slots: int
    expert_bytes: int
    counts: Counts
    forwards: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=0))

    @property
    def bytes_moved(self) -> int:
        """The bytes brought to slots so far."""
        return self.counts.misses * self.expert_bytes


class ExpertTrace:
    """Traces the layers of a model whose experts are offloaded.

    Hits, misses and bytes are always counted. Which experts were chosen is recorded between `record` and `stop`.

    Attributes:
        layers: the layers' traces, by the name of the experts module.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerTrace] = {}
        self._keep = 0

    def add(self, name: str, layer: LayerTrace) -> None:
        """Counts and records a layer too."""
        if name in self.layers:
            raise ValueError(f"this trace has a layer {name!r} already; give each model a trace of its own")
        layer.forwards = deque(layer.forwards, maxlen=self._keep)
        self.layers[name] = layer

    def record(self, keep: int = KEEP) -> None:
        """Records the experts of each forward from now on, the last `keep` forwards of every layer."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1 forward, got {keep}")
        self._resize(keep)

    def stop(self) -> None:
        """Records no more; what was recorded stays."""
        self._keep = 0
        for layer in self.layers.values():
            # A deque that is full takes no more: the forwards so far, as they are.
            layer.forwards = _Stopped(layer.forwards)

    def clear(self) -> None:
        """Counts from zero, and forgets what was recorded."""
        for layer in self.layers.values():
            layer.counts.hits = layer.counts.misses = 0
            layer.forwards.clear()

    def hit_rate(self, layer: str | None = None) -> float:
        """The share of chosen experts that were in slots, in one layer or in all; 0 where none was chosen."""
        return _rate(each.counts for each in self._of(layer))

    def bytes_moved(self, layer: str | None = None) -> int:
        """The bytes brought to slots, in one layer or in all."""
        return sum(each.bytes_moved for each in self._of(layer))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes counts and recorded forwards as JSON: the whole file, or what was there before stays."""
        layers = {
            name: {
                "num_experts": layer.num_experts,
                "num_slots": layer.num_slots,
                "expert_bytes": layer.expert_bytes,
                "hits": layer.counts.hits,
                "misses": layer.counts.misses,
                "forwards": [list(forward) for forward in layer.forwards],
            }
            for name, layer in self.layers.items()
        }
        beside = f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"
        try:
            with open(beside, "x") as file:
                json.dump({"format": FORMAT, "version": VERSION, "layers": layers}, file, separators=(",", ":"))
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(beside)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertTrace:
        """Loads a trace that `save` wrote.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        with open(path, encoding="utf-8") as file:
            try:
                given = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{os.fspath(path)!r} is no whole JSON file ({error})") from error
        try:
            return _from_json(given)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} holds no expert trace: {error}") from error

    def __rich__(self) -> Table:
        return port("trace_table")(self)

    def counts(self, layer: str | None = None) -> Counts:
        """The hits and misses of a layer, or of all."""
        counts = [each.counts for each in self._of(layer)]
        return Counts(sum(each.hits for each in counts), sum(each.misses for each in counts))

    def _of(self, name: str | None) -> list[LayerTrace]:
        if name is None:
            return list(self.layers.values())
        if name not in self.layers:
            raise KeyError(f"no layer {name!r} in this trace; there are {', '.join(self.layers) or 'none'}")
        return [self.layers[name]]

    def _resize(self, keep: int) -> None:
        self._keep = keep
        for layer in self.layers.values():
            layer.forwards = deque(layer.forwards, maxlen=keep)


class _Stopped(deque[tuple[int, ...]]):
    """A list of forwards that takes no more."""

    def append(self, forward: tuple[int, ...]) -> None:
        """Ignores a forward."""


@dataclass(frozen=True)
class Replay:
    """What a policy would have made of a trace.

    Attributes:
        eviction: the policy's name.
        num_slots: S.
        counts: hits and misses by layer.
        bytes_moved: the bytes brought in all layers.
    """

    eviction: str
    num_slots: int
    counts: Mapping[str, Counts]
    bytes_moved: int

    def hit_rate(self, layer: str | None = None) -> float:
        """The share of chosen experts that were in slots; see `ExpertTrace.hit_rate`."""
        return _rate(self.counts.values() if layer is None else [self.counts[layer]])


def replay(trace: ExpertTrace, eviction: str | Callable[[], Eviction], num_slots: int) -> Replay:
    """Simulates a policy on the forwards that a trace recorded, from empty slots.

    Args:
        trace: a trace with recorded forwards.
        eviction: a policy's name, what makes one of one's own, or ``"belady"``, which no policy can beat, since it
            knows the future. Where each forward fits into the slots it is Belady's optimum; else a bound that may lie
            above it.
        num_slots: S; a layer with fewer experts has as many slots as experts.

    Raises:
        ValueError: nothing was recorded.
    """
    if not any(layer.forwards for layer in trace.layers.values()):
        raise ValueError("nothing was recorded; call trace.record(), run the model, and replay then")
    if num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    counts = {}
    for name, layer in trace.layers.items():
        slots = min(num_slots, layer.num_experts)
        if eviction == BELADY:
            counts[name] = _optimum(list(layer.forwards), slots)
        else:
            counts[name] = _simulated(layer.forwards, SlotTable(slots, eviction))
    moved = sum(counts[name].misses * layer.expert_bytes for name, layer in trace.layers.items())
    return Replay(eviction_name(eviction), num_slots, counts, moved)


def compare(
    trace: ExpertTrace,
    num_slots: Sequence[int],
    evictions: Sequence[str | Callable[[], Eviction]] = ("lru", "lfu", "fifo", BELADY),
) -> Table:
    """Compares hit rates and bytes a forward for each number of slots and each policy, as a rich table."""
    return port("replay_table")(trace, num_slots, evictions)


def _rate(counts: Iterable[Counts]) -> float:
    every = list(counts)
    hits, misses = sum(each.hits for each in every), sum(each.misses for each in every)
    return hits / (hits + misses) if hits + misses else 0.0


def _simulated(forwards: Iterable[tuple[int, ...]], table: SlotTable) -> Counts:
    for forward in forwards:
        for expert in table.begin(forward):
            table.place(expert)
    return table.counts


def _optimum(forwards: list[tuple[int, ...]], num_slots: int) -> Counts:
    """Replays with foresight: keeps what is used again soonest, wherever something must go."""
    uses: list[dict[int, int]] = []  # of each forward's experts: the forward that uses it next
    seen: dict[int, int] = {}
    for time in reversed(range(len(forwards))):
        uses.append({expert: seen[expert] for expert in forwards[time] if expert in seen})
        seen |= dict.fromkeys(forwards[time], time)
    counts = Counts()
    kept: dict[int, int] = {}  # expert -> its next use
    for forward, nexts in zip(forwards, reversed(uses), strict=True):
        chosen = set(forward)
        counts.hits += len(chosen & kept.keys())
        counts.misses += len(chosen - kept.keys())
        others = {expert: use for expert, use in kept.items() if expert not in chosen}
        # While a forward is computed its experts take slots, if only one at a time where there are more than slots.
        beside = num_slots - len(chosen) if len(chosen) <= num_slots else num_slots - 1
        kept = _soonest({**_soonest(others, beside), **nexts}, num_slots)
    return counts


def _soonest(uses: dict[int, int], count: int) -> dict[int, int]:
    return dict(sorted(uses.items(), key=lambda item: (item[1], item[0]))[:count])


def _from_json(given: Any) -> ExpertTrace:
    if not isinstance(given, dict) or given.keys() != {"format", "version", "layers"} or given["format"] != FORMAT:
        raise ValueError(f"it is not of the format {FORMAT!r}")
    if given["version"] != VERSION:
        raise ValueError(f"it is of version {given['version']!r}, and this hfkv reads {VERSION}")
    if not isinstance(given["layers"], dict):
        raise ValueError("its layers are no object")
    trace = ExpertTrace()
    for name, layer in given["layers"].items():
        names = ("num_experts", "num_slots", "expert_bytes", "hits", "misses", "forwards")
        if not isinstance(layer, dict) or set(layer) != set(names):
            raise ValueError(f"layer {name!r} does not have {', '.join(names)}")
        numbers = [layer[each] for each in names[:-1]]
        forwards = layer["forwards"]
        if not all(_is_count(number) for number in numbers) or not isinstance(forwards, list):
            raise ValueError(f"layer {name!r} has something that is no count")
        if not all(isinstance(forward, list) and all(map(_is_count, forward)) for forward in forwards):
            raise ValueError(f"layer {name!r} has a forward that is no list of experts")
        if any(expert >= numbers[0] for forward in forwards for expert in forward):
            raise ValueError(f"layer {name!r} names an expert that its {numbers[0]} do not have")
        kept = _Stopped(map(tuple, forwards))
        trace.layers[name] = LayerTrace(numbers[0], numbers[1], numbers[2], Counts(numbers[3], numbers[4]), kept)
    return trace


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
