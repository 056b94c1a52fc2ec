"""How `hfkv bench` takes turns: who comes when, for how long, beside whom, and the clocks."""

from __future__ import annotations

import psutil
import pytest
import torch

from hfkv.bench.contenders import Contender
from hfkv.bench.lane import Lane
from hfkv.bench.turns import Turns, take_turns
from hfkv.measure.timing import copy_bandwidth, milliseconds, quantiles

CPU = torch.device("cpu")


class FakeLane(Lane):
    def __init__(self, name: str, log: list[str], fails: bool = False) -> None:
        super().__init__(Contender(name))
        self.log, self.fails = log, fails

    def open(self) -> None:
        self.log.append(f"open {self.name}")

    def warm_up(self) -> None:
        self.log.append(f"warm {self.name}")

    def turn(self) -> list[float]:
        if self.fails:
            raise MemoryError("no room")
        self.log.append(self.name)
        return [1.0, 2.0]

    def close(self) -> None:
        self.log.append(f"close {self.name}")


def test_contenders_take_turns() -> None:
    log: list[str] = []
    lanes = [FakeLane("a", log), FakeLane("b", log)]
    take_turns(lanes, Turns(2, 1.0), True, lambda what, share: None)
    assert log == ["warm a", "a", "warm b", "b", "a", "b"]
    assert [(lane.times, lane.failure) for lane in lanes] == [([1.0, 2.0] * 2, None)] * 2


def test_processes_are_busy_while_they_do_and_no_longer() -> None:
    class Watched(FakeLane):
        def turn(self) -> list[float]:
            return [psutil.Process(child.pid).cpu_times().user for child in psutil.Process().children()]

    before = len(psutil.Process().children())
    lane = Watched("a", [])
    take_turns([lane], Turns(1, 1.0, busy=2), True, lambda what, share: None)
    assert len(lane.times) == before + 2
    assert sum(time > 0 for time in lane.times) >= 2
    assert len(psutil.Process().children()) == before


def test_caches_that_do_not_fit_at_once_are_filled_for_every_turn() -> None:
    log: list[str] = []
    lanes = [FakeLane("a", log), FakeLane("b", log, fails=True)]
    take_turns(lanes, Turns(2, 1.0), False, lambda what, share: None)
    assert log == [
        "open a",
        "warm a",
        "a",
        "close a",
        "open b",
        "warm b",
        "close b",
        "open a",
        "warm a",
        "a",
        "close a",
    ]
    assert (lanes[0].times, lanes[0].failure) == ([1.0, 2.0] * 2, None)
    assert (lanes[1].times, lanes[1].failure) == ([], "out of memory: no room")


def test_turns_end_after_their_seconds_and_no_sooner_than_the_least() -> None:
    turns = Turns(None, 2.0, least=5, most=9)
    assert turns.share(4, 99.0) == pytest.approx(0.8)
    assert turns.share(5, 1.0) == pytest.approx(0.5)
    assert turns.share(6, 2.0) == turns.share(9, 0.1) == 1
    assert Turns(3, 2.0).share(2, 99.0) == pytest.approx(2 / 3)


def test_quantiles_and_clocks() -> None:
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert milliseconds(lambda: sum(range(200_000)), CPU) > 0.1
    assert copy_bandwidth(CPU) > 1e8
