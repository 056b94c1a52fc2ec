"""Eviction policies, the table of slots, recorded traces and what replaying them tells."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hfkv.experts.config import MoEConfig
from hfkv.experts.offload.eviction import EVICTIONS, LRU, Eviction, make_eviction
from hfkv.experts.offload.slot_table import Counts, SlotTable
from hfkv.experts.offload.trace import ExpertTrace, LayerTrace, compare, replay

# One expert a forward, three slots' worth of the textbook's example of paging.
PAGES = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]


def traced(forwards: Sequence[Sequence[int]], num_experts: int = 8) -> ExpertTrace:
    trace = ExpertTrace()
    trace.add("layer", LayerTrace(num_experts, 1, 10, Counts()))
    trace.record()
    trace.layers["layer"].forwards.extend(map(tuple, forwards))
    return trace


@pytest.mark.parametrize(("eviction", "misses"), [("fifo", 15), ("lru", 12), ("belady", 9)])
def test_a_trace_of_the_textbook_misses_as_often_as_there(eviction: str, misses: int) -> None:
    replayed = replay(traced([[page] for page in PAGES]), eviction, 3)
    assert replayed.counts["layer"] == Counts(20 - misses, misses)
    assert replayed.hit_rate() == replayed.hit_rate("layer") == (20 - misses) / 20
    assert replayed.bytes_moved == misses * 10


def test_hit_rates_of_small_traces_by_hand() -> None:
    # 0 and 1 come, 0 again; 2 drives out 1 (lru, lfu) or 0 (fifo); then 0: a hit but for fifo.
    forwards = [[0], [1], [0], [2], [0]]
    assert [replay(traced(forwards), name, 2).counts["layer"].hits for name in ("lru", "lfu", "fifo")] == [2, 2, 1]
    # 0 is used three times, 1 and 2 once each after it: lru lets 0 go, lfu does not.
    forwards = [[0], [0], [0], [1], [2], [0]]
    assert [replay(traced(forwards), name, 2).counts["layer"].hits for name in ("lru", "lfu")] == [2, 3]
    # How often counts across absences: 1 was used twice and has left; when it is back it stays, and 2 goes.
    forwards = [[0], [0], [0], [1], [1], [2], [1], [2], [1]]
    assert replay(traced(forwards), "lfu", 2).counts["layer"] == Counts(4, 5)


def test_what_a_forward_needs_stays_until_it_is_used() -> None:
    table = SlotTable(2, "fifo")
    for expert in table.begin([0, 1]):
        table.place(expert)
    # 0 came first, and would leave for 2; but this forward needs it.
    assert table.begin([2, 0]) == [0, 2]
    assert table.place(0) == (table.slot_of[0], False)
    assert table.place(2)[1]
    assert set(table.slot_of) == {0, 2}
    assert table.counts == Counts(1, 3)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_more_experts_than_slots_go_in_rounds_that_hits_lead(num_slots: int) -> None:
    table = SlotTable(num_slots, "lru")
    for expert in table.begin(range(num_slots)):
        table.place(expert)
    order = table.begin([*range(7, -1, -1)])
    assert sorted(order[:num_slots]) == list(range(num_slots))
    rounds = table.rounds(order)
    assert [expert for of_round in rounds for expert in of_round] == order
    before: list[int] = []
    for of_round in rounds:
        for expert in of_round:
            table.place(expert)
        together = of_round if num_slots == 1 else [*before, *of_round]
        assert set(together) <= set(table.slot_of)
        before = of_round
    assert table.counts == Counts(num_slots, 8)


class Lowest(Eviction):
    """Of one's own: the lowest number goes."""

    def victim(self, resident: Collection[int], needed: Collection[int]) -> int:
        return min(set(resident) - set(needed))


class Wrong(Eviction):
    def victim(self, resident: Collection[int], needed: Collection[int]) -> int:
        return 99


def test_a_policy_of_ones_own() -> None:
    assert MoEConfig(offload=True, eviction=Lowest).eviction is Lowest
    assert str(MoEConfig(offload=True, eviction=Lowest)) == "auto+offload+eviction:Lowest"
    assert replay(traced([[0], [1], [2], [1], [2]]), Lowest, 2).counts["layer"] == Counts(2, 3)
    assert isinstance(make_eviction(lambda: LRU()), LRU)
    with pytest.raises(ValueError, match=r"Wrong\.victim returned 99; it must be one of \[0, 1\]"):
        replay(traced([[0], [1], [2]]), Wrong, 2)
    with pytest.raises(TypeError, match=r"no hfkv\.experts\.offload\.eviction\.Eviction"):
        make_eviction(lambda: 3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("wrong", ["mru", 3, Lowest(), int])
def test_what_is_no_policy_is_refused(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"MoEConfig\.eviction"):
        MoEConfig(offload=True, eviction=wrong)  # type: ignore[arg-type]


def test_a_path_is_of_offload_and_not_of_the_string() -> None:
    config = MoEConfig(offload=True, path=Path("experts"))  # type: ignore[arg-type]
    assert config.path == "experts"
    assert str(config) == "auto+offload"
    with pytest.raises(ValueError, match="path needs offload=True"):
        MoEConfig(path="experts")
    with pytest.raises(TypeError, match=r"MoEConfig\.path"):
        MoEConfig(offload=True, path=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown word"):
        MoEConfig.parse("offload+path:experts")


FORWARDS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(FORWARDS, st.integers(1, 6))
def test_no_policy_beats_belady(forwards: list[list[int]], num_slots: int) -> None:
    trace = traced(forwards, 6)
    best = replay(trace, "belady", num_slots).counts["layer"]
    for name in (*EVICTIONS, Lowest):
        counts = replay(trace, name, num_slots).counts["layer"]
        assert counts.hits + counts.misses == best.hits + best.misses == sum(len(set(each)) for each in forwards)
        assert counts.hits <= best.hits


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=2), min_size=1, max_size=7), st.integers(2, 3))
def test_belady_is_what_the_best_of_all_choices_reaches(forwards: list[list[int]], num_slots: int) -> None:
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for forward in forwards:
        chosen, reached = frozenset(forward), {}
        for kept, hits in best.items():
            others = kept - chosen
            size = min(len(others), num_slots - len(chosen))
            for stay in itertools.combinations(others, size):
                key = chosen | set(stay)
                reached[key] = max(reached.get(key, 0), hits + len(kept & chosen))
        best = reached
    assert replay(traced(forwards), "belady", num_slots).counts["layer"].hits == max(best.values())


def test_a_recording_is_bounded_and_stops() -> None:
    trace = ExpertTrace()
    layer = LayerTrace(4, 2, 10, Counts(3, 1))
    trace.add("layer", layer)
    layer.forwards.append((0,))
    assert not layer.forwards
    trace.record(keep=2)
    layer.forwards.extend([(0,), (1,), (2,)])
    assert list(layer.forwards) == [(1,), (2,)]
    trace.stop()
    layer.forwards.append((3,))
    assert list(layer.forwards) == [(1,), (2,)]
    assert (trace.hit_rate(), trace.bytes_moved("layer")) == (0.75, 10)
    trace.clear()
    assert (trace.hit_rate(), trace.bytes_moved(), len(layer.forwards)) == (0.0, 0, 0)
    with pytest.raises(ValueError, match="nothing was recorded"):
        replay(trace, "lru", 2)
    with pytest.raises(ValueError, match="at least 1 forward"):
        trace.record(0)
    with pytest.raises(ValueError, match="a layer 'layer' already"):
        trace.add("layer", layer)
    with pytest.raises(KeyError, match="no layer 'other'"):
        trace.hit_rate("other")


def test_a_trace_is_saved_and_loaded(tmp_path: Path) -> None:
    trace = traced([[0, 3], [1, 2]])
    trace.layers["layer"].counts.hits = 5
    trace.save(tmp_path / "trace.json")
    loaded = ExpertTrace.load(tmp_path / "trace.json")
    assert [list(layer.forwards) for layer in loaded.layers.values()] == [[(0, 3), (1, 2)]]
    assert loaded.layers["layer"].counts == Counts(5, 0)
    assert replay(loaded, "lru", 2).counts == replay(trace, "lru", 2).counts
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda given: given.update(format="other"),
        lambda given: given.update(version=2),
        lambda given: given.update(more=1),
        lambda given: given.update(layers=[]),
        lambda given: given["layers"]["layer"].pop("hits"),
        lambda given: given["layers"]["layer"].update(hits=-1),
        lambda given: given["layers"]["layer"].update(forwards=[[9]]),
        lambda given: given["layers"]["layer"].update(forwards=[["a"]]),
        lambda given: given["layers"]["layer"].update(forwards=3),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "trace.json"
    traced([[0, 3]]).save(path)
    content = json.loads(path.read_text())
    damage(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="holds no expert trace"):
        ExpertTrace.load(path)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="no whole JSON"):
        ExpertTrace.load(path)


def test_tables_say_what_to_choose_by() -> None:
    trace = traced([[page] for page in PAGES])
    trace.layers["layer"].counts.misses = 4
    console = Console(width=120)
    with console.capture() as capture:
        console.print(trace)
        console.print(compare(trace, [2, 3]))
    text = capture.get()
    for word in ("layer", "0.0%", "40 B", "lru", "belady", "40.0%", "55.0%"):
        assert word in text
