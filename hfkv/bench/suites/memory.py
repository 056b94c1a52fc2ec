"""The suite ``memory``: bytes of one layer's cache after a context, and the most that one decode step allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hfkv.bench.setting import Setting
from hfkv.bench.suite import Cell
from hfkv.bench.suites.attention import AttentionLane, AttentionSuite
from hfkv.bench.turns import Turns
from hfkv.measure.allocation_meter import AllocationMeter


class MemoryLane(AttentionLane):
    """One contender's cache, which is filled, checked and stepped under a meter, and takes no turns."""

    def prepare(self) -> dict[str, Any]:
        """Makes it ready and checks it, and sees the most that is allocated during a step."""
        with AllocationMeter(self.tokens.query.device) as meter:
            figures = super().prepare()
            self.step()
            meter.start()
            self.step()
        return {**figures, "peak_bytes": meter.peak}


class MemorySuite(AttentionSuite):
    """The suite."""

    lane = MemoryLane

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # Compiled or not, it allocates the same cache.
        for index, one in enumerate(self.contenders):
            if one.is_compiled:
                self.contenders[index] = replace(one, is_compiled=False, reason=None)

    def num_layers(self, context: int) -> int:
        return 1

    def turns(self, cell: Cell) -> Turns:
        """None at all, and no room for any."""
        return Turns(0, self.setting.seconds)
