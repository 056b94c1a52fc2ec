"""`SlotTable`: which expert is in which slot of a layer; integers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hfkv.experts.offload.eviction import Eviction, make_eviction


@dataclass
class Counts:
    """Counts of the experts that forwards chose, each counted once a forward.

    Attributes:
        hits: experts that were found in slots.
        misses: experts that were brought.
    """

    hits: int = 0
    misses: int = 0


class SlotTable:
    """Decides what is brought and what leaves; a recorded trace is replayed by the same rules that a model runs by.

    A forward names the experts it chooses. Those that are in slots come first, so that none of them leaves before it is
    used; then the others, in the order given. Where all fit, none of a forward's experts makes room for another. Where
    they do not, they are used in rounds of half the slots: a round is brought while the one before is computed with.

    Args:
        num_slots: S.
        eviction: a policy's name, or what makes one.

    Attributes:
        slot_of: the slot of each expert that is in one.
        counts: the counts since the beginning.
    """

    def __init__(self, num_slots: int, eviction: str | Callable[[], Eviction]) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.num_slots = num_slots
        self.eviction = make_eviction(eviction)
        self.slot_of: dict[int, int] = {}
        self.counts = Counts()
        self._free = list(reversed(range(num_slots)))
        self._place: dict[int, int] = {}  # of each expert in this forward's order

    @property
    def round_size(self) -> int:
        """The number of experts of a round, where there are more than slots."""
        return max(self.num_slots // 2, 1)

    def begin(self, experts: Iterable[int]) -> list[int]:
        """Begins a forward that chooses `experts`, each named once or more.

        Returns:
            The experts, each once, in the order in which they are to be used.
        """
        distinct = list(dict.fromkeys(experts))
        here = [expert for expert in distinct if expert in self.slot_of]
        self.counts.hits += len(here)
        for expert in here:
            self.eviction.touch(expert)
        order = here + [expert for expert in distinct if expert not in self.slot_of]
        self._place = {expert: place for place, expert in enumerate(order)}
        return order

    def rounds(self, order: list[int]) -> list[list[int]]:
        """Cuts what `begin` returned into rounds that are in slots together."""
        size = max(self.num_slots if len(order) <= self.num_slots else self.round_size, 1)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def place(self, expert: int) -> tuple[int, bool]:
        """The slot of an expert, and whether it is to be brought there first."""
        if expert in self.slot_of:
            return self.slot_of[expert], False
        slot = self._free.pop() if self._free else self.slot_of.pop(self._victim(expert))
        self.slot_of[expert] = slot
        self.counts.misses += 1
        self.eviction.admit(expert)
        return slot, True

    def forget(self, expert: int) -> None:
        """Takes back that an expert was brought: its slot is free, and it counts as no miss."""
        self._free.append(self.slot_of.pop(expert))
        self.counts.misses -= 1

    def empty(self) -> None:
        """Empties all slots."""
        self._free = list(reversed(range(self.num_slots)))
        self.slot_of.clear()

    def _victim(self, expert: int) -> int:
        needed = self._needed(expert)
        victim = self.eviction.victim(tuple(self.slot_of), needed)
        if victim not in self.slot_of or victim in needed:
            raise ValueError(
                f"{type(self.eviction).__name__}.victim returned {victim!r}; it must be one of {sorted(self.slot_of)} "
                f"that is not among {sorted(needed)}"
            )
        return victim

    def _needed(self, expert: int) -> frozenset[int]:
        """The experts that may not leave when `expert` comes."""
        place = self._place.get(expert)
        if place is None:
            return frozenset()
        if len(self._place) <= self.num_slots:
            return frozenset(self._place)
        size = self.round_size
        first = place // size * size
        begin = first if self.num_slots == 1 else first - size
        return frozenset(other for other, at in self._place.items() if begin <= at < first + size)
