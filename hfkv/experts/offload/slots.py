"""`ExpertSlots`: the experts of one layer that are where they are computed, and how they get there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hfkv.experts.offload.eviction import Eviction
from hfkv.experts.offload.expert_source import ExpertSource, blank, fill
from hfkv.experts.offload.landing import Landing, landing_for
from hfkv.experts.offload.slot_table import SlotTable
from hfkv.experts.offload.trace import LayerTrace
from hfkv.experts.weights import ExpertWeights
from hfkv.models.mapped_file import will_need
from hfkv.stores.offload.bus import Bus, bus_to

# Experts of a file that are asked for ahead of the one that is being copied.
_AHEAD = 2


class ExpertSlots:
    """S of the E experts of a layer, both projections of each together, out of two sources.

    Without a bus, slots are written by the host when an expert is needed. With one, they are copied to by the device,
    beside what it computes: behind the kernels that read what was in a slot before, and ahead of those that read what
    comes.

    Args:
        up, down: the sources of the two projections.
        num_slots: S; at most E are made.
        eviction: a policy's name, or what makes one.
        device: the slots' device.
        bus: the way to the device; None where the host writes them itself.

    Attributes:
        weights: the slots' weights, into an expert and out of it.
        table: which expert is where.
        layer: what is counted and recorded.
        lock: is held while an expert is brought and computed with.

    Raises:
        ValueError: there is no slot, or the sources hold different experts.
        MemoryError: there is no memory for the slots.
    """

    def __init__(
        self,
        up: ExpertSource,
        down: ExpertSource,
        num_slots: int,
        eviction: str | Callable[[], Eviction],
        device: torch.device,
        bus: Bus | None = None,
    ) -> None:
        if up.shape[0] != down.shape[0]:
            raise ValueError(f"{up.shape[0]} experts into, and {down.shape[0]} out of a layer")
        self.sources = up, down
        self.device, self.bus, self.eviction = device, bus, eviction
        self.table = SlotTable(min(num_slots, up.shape[0]), eviction)
        self.weights: tuple[ExpertWeights, ExpertWeights] = tuple(self._blank(source) for source in self.sources)  # type: ignore[assignment]
        self.expert_bytes = up.expert_bytes + down.expert_bytes
        self.layer = LayerTrace(up.shape[0], self.num_slots, self.expert_bytes, self.table.counts)
        self.lock = threading.RLock()
        self._coming: list[int] = []
        # Of each slot, by thread: what stands for the last computation that reads it.
        self._read: list[dict[int, Any]] = [{} for _ in range(self.num_slots)]
        if bus is not None:
            self._mark(range(self.num_slots))
        self._landing: Landing | None = None
        self._copied: tuple[Any, ExpertSlots, int] | None = None

    @property
    def num_slots(self) -> int:
        """The number of slots, S."""
        return self.table.num_slots

    @property
    def num_experts(self) -> int:
        """The number of experts, E."""
        return self.sources[0].shape[0]

    def expect(self, experts: Iterable[int]) -> list[int]:
        """Begins a forward that uses `experts`.

        Returns:
            The experts, each once, in the order in which the fewest have to be brought.
        """
        with self.lock:
            order = self.table.begin(experts)
            if self.layer.forwards.maxlen != 0:
                self.layer.forwards.append(tuple(sorted(order)))
            self._coming = [expert for expert in order if expert not in self.table.slot_of]
            self._read_ahead(self._coming[:_AHEAD])
            return order

    @contextmanager
    def holding(self, expert: int) -> Iterator[int]:
        """Keeps `expert` in the slot it gives while the context lasts, for computations asked for meanwhile."""
        with self.lock:
            (slot,) = self.bring([expert])
            yield slot
            self.release([slot])

    def bring(self, experts: Sequence[int]) -> list[int]:
        """Brings `experts`, at most S, into slots for what the device is asked to compute from here on.

        Returns:
            The experts' slots. `release` them once what reads them has been asked for.

        Raises:
            ValueError: there are more than S, or a source is damaged; what could not be brought is in no slot.
            MemoryError: there is no memory to bring them through.
        """
        slots, copied = self.send(experts)
        self.wait(copied)
        return slots

    def send(self, experts: Sequence[int]) -> tuple[list[int], list[Any]]:
        """Does what `bring` does, without waiting: what comes is read only after `wait`."""
        if len(set(experts)) > self.num_slots:
            raise ValueError(f"{len(set(experts))} experts for {self.num_slots} slots; bring them in rounds")
        with self.lock:
            slots, copied = [], []
            for expert in experts:
                slot, is_missing = self.table.place(expert)
                slots.append(slot)
                if is_missing:
                    try:
                        copied.append(self._fetch(expert, slot))
                    except BaseException:
                        self.table.forget(expert)
                        raise
            return slots, copied

    def wait(self, copied: Sequence[Any]) -> None:
        """Makes what the device is asked to compute from here on come after what was sent."""
        if self.bus is not None and copied:
            self.bus.wait(copied[-1])  # copies are made one after the other

    def release(self, slots: Sequence[int]) -> None:
        """Notes that what reads `slots` has been asked for: they may be written to once it is done."""
        if self.bus is not None:
            self._mark(slots)

    def refresh(self, half: int, expert: int) -> None:
        """Brings anew, uncounted, what slots hold of a source that has changed."""
        with self.lock:
            if expert in self.table.slot_of:
                slot = self.table.slot_of[expert]
                self.wait([self._fetch(expert, slot)])

    def resident(self) -> list[int]:
        """The expert of each slot; 0 where it has none."""
        experts = [0] * self.num_slots
        for expert, slot in self.table.slot_of.items():
            experts[slot] = expert
        return experts

    def nbytes(self, half: int) -> int:
        """The bytes of the slots of one projection."""
        return self.weights[half].nbytes()

    def held_bytes(self, half: int) -> int:
        """The bytes of the slots that hold an expert."""
        return self.nbytes(half) // self.num_slots * len(self.table.slot_of)

    def copy_for(self, half: int, key: Any, make: Callable[[], ExpertSlots]) -> ExpertSlots:
        """The slots for a copy of the model, the same for both projections though each asks by itself."""
        with self.lock:
            if self._copied is not None and self._copied[0] == key and self._copied[2] != half:
                copied = self._copied[1]
                self._copied = None
                return copied
            copied = make()
            self._copied = key, copied, half
            return copied

    def _blank(self, source: ExpertSource) -> ExpertWeights:
        shape = (self.table.num_slots, *source.shape[1:])
        # Plain ones stay plain on a CPU too: to write 8 MB in oneDNN's order takes 3 to 8 ms where a copy takes 0.5,
        # and saves 0.3 of a token's product (one core of an AMD EPYC; in bf16 both round alike).
        return blank(
            source.codec, shape, source.dtype, self.device, is_packed=False, is_transposed=source.is_transposed
        )

    def _fetch(self, expert: int, slot: int) -> Any:
        self._coming = [other for other in self._coming if other != expert]
        self._read_ahead(self._coming[_AHEAD - 1 : _AHEAD])
        if self.bus is None:
            for weights, source in zip(self.weights, self.sources, strict=True):
                fill(weights, slot, source, expert)
            return None
        planes: dict[str, torch.Tensor] = {}
        targets: dict[str, torch.Tensor] = {}
        for half, (weights, source) in enumerate(zip(self.weights, self.sources, strict=True)):
            planes |= {f"{half}.{name}": plane for name, plane in source.expert(expert).items()}
            for name, plane in weights.planes().items():
                targets[f"{half}.{name}"] = plane[slot].t() if source.is_transposed else plane[slot]
        if all(source.is_pinned for source in self.sources):
            return self._send(planes, targets, slot)
        self._landing = self._landing or landing_for(self.bus, planes)
        with self._landing.lock:
            return self._send(self._landing.take(planes), targets, slot)

    def _send(self, planes: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], slot: int) -> Any:
        assert self.bus is not None
        marks = list(self._read[slot].values()) or [self.bus.mark()]
        self._read[slot].clear()
        for mark in marks[:-1]:
            self.bus.to_device([], after=mark)
        return self.bus.to_device([(planes[name], targets[name]) for name in planes], after=marks[-1])

    def _mark(self, slots: Iterable[int]) -> None:
        assert self.bus is not None
        mark = self.bus.mark()
        for slot in slots:
            self._read[slot][threading.get_ident()] = mark

    def _read_ahead(self, experts: Sequence[int]) -> None:
        """Asks for experts of a file, so that they are read while others are computed with."""
        for expert in experts:
            for source in self.sources:
                if source.path is not None:
                    for plane in source.planes.values():
                        will_need(plane[expert])

    def __reduce__(self) -> Any:
        return _rebuild, (*self.sources, self.num_slots, self.eviction, self.device, self.bus is not None)


def _rebuild(
    up: ExpertSource,
    down: ExpertSource,
    num_slots: int,
    eviction: str | Callable[[], Eviction],
    device: torch.device,
    is_apart: bool,
) -> ExpertSlots:
    return ExpertSlots(up, down, num_slots, eviction, device, bus_to(device) if is_apart else None)
