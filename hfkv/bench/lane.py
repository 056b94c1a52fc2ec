"""`Lane`: one contender on its way through a table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hfkv.bench.contenders import Contender
from hfkv.bench.gate import Errors
from hfkv.bench.results import OK, WRONG
from hfkv.bench.tokens import allocated_bytes, bus_bytes, held_bytes


@dataclass(eq=False)
class Lane:
    """One contender on its way through a table; a suite says what its cache, its turns and its check are."""

    contender: Contender
    layers: int = field(default=1, init=False)  # of its cache, whose bytes are counted
    cache: Any = field(default=None, init=False)
    times: list[float] = field(default_factory=list, init=False)  # of all turns, in ms
    failure: str | None = field(default=None, init=False)  # why it takes no more of them

    warm_ups = 0
    warm_ms = 0.0

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.contender.name

    def prepare(self) -> dict[str, Any]:
        """Makes it ready and checks it: fields of `Row` that are known before a turn."""
        self.open()
        figures, errors = self.figures(), self.check()
        figures |= {"error_twin": errors.twin, "error_full": errors.full, "error_logits": errors.logits}
        return {**figures, "status": WRONG if errors.wrong else OK, "note": errors.wrong}

    def open(self) -> None:
        """Makes the cache and fills it."""

    def figures(self) -> dict[str, Any]:
        """Fields of `Row`: bytes held, allocated, and those a turn must read."""
        read = self.read_bytes()
        return {
            "held_bytes": held_bytes(self.cache, self.layers),
            "allocated_bytes": allocated_bytes(self.cache, self.layers),
            "read_bytes": read,
            "bus_bytes": None if read is None else bus_bytes(self.cache, self.layers),
        }

    def read_bytes(self) -> int | None:
        """What a turn must read; None where it is arithmetic and has no floor of bytes."""
        return None

    def check(self) -> Errors:
        """How far its results are from what they should be."""
        raise NotImplementedError

    def work(self) -> Callable[[], object]:
        """What a turn times, made ready."""
        return self.turn

    def warm_up(self) -> None:
        """Does what only the first turns do: compiles, allocates. The last says how long one takes to launch."""
        for _ in range(self.warm_ups):
            work = self.work()
            begin = time.perf_counter()
            work()
            self.warm_ms = 1e3 * (time.perf_counter() - begin)

    def turn(self) -> list[float]:
        """Times one or a few steps, in ms each; none where it sits this turn out."""
        raise NotImplementedError

    def counted(self) -> dict[str, Any]:
        """Fields of `Row` that are known after all turns only."""
        return {}

    def close(self) -> None:
        """Lets go of the cache."""
        self.cache = None
