"""`OffloadedWeights`: experts that live in host memory or in a file, and are computed with in a few slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hfkv.experts.adapters import Factors
from hfkv.experts.grouped import run_grouped
from hfkv.experts.offload.expert_source import Encoder, ExpertSource
from hfkv.experts.offload.slots import ExpertSlots
from hfkv.experts.projection import Projection
from hfkv.experts.weights import ExpertWeights, check_matrix
from hfkv.kernels.experts.codes import Codes
from hfkv.stores.offload.bus import BUSES, bus_to

Run = Callable[[Any, tuple[Projection, Projection], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OffloadedWeights(ExpertWeights):
    """One projection of a layer's experts; the other shares its slots.

    Args:
        slots: the layer's slots.
        half: 0 for the projection into an expert, 1 for the one out of it.
    """

    def __init__(self, slots: ExpertSlots, half: int) -> None:
        self.slots, self.half = slots, half
        source = self.source
        self.shape, self.dtype = source.shape, source.dtype
        self.form = f"offloaded {'plain' if source.codec == 'none' else source.codec}"
        self.is_lossy = source.codec != "none"

    @property
    def source(self) -> ExpertSource:
        """The source of all experts."""
        return self.slots.sources[self.half]

    @property
    def device(self) -> torch.device:
        """The device of the slots."""
        return self.slots.device

    def expect(self, experts: list[int]) -> list[int]:
        return self.slots.expect(experts)

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        with self.slots.holding(expert) as slot:
            return self.slots.weights[self.half].linear(x, slot)

    def decode(self, expert: int) -> torch.Tensor:
        """Decodes a fresh matrix `[N, K]`, from its slot or else from the source, past the slots."""
        with self.slots.lock:
            if expert not in self.slots.table.slot_of:
                return self.source.one(expert, self.device).decode(0)
            with self.slots.holding(expert) as slot:
                matrix = self.slots.weights[self.half].decode(slot)
                return matrix.clone() if self.source.codec == "none" else matrix

    def can_take(self, other: ExpertWeights) -> bool:
        return False

    def write(self, expert: int, matrix: torch.Tensor) -> None:
        """Replaces one expert's matrix by `matrix` `[N, K]`, in the source and in its slot.

        Raises:
            RuntimeError: the experts are in a file.
        """
        check_matrix(self, matrix)
        source = self.source
        if source.path is not None:
            raise RuntimeError(
                f"experts that are read from {source.path!r} are not written to; load the model without offload (or "
                "hfkv.unpatch(model)), change it there, and write a new file"
            )
        with self.slots.lock:
            planes = Encoder(source.codec, source.shape, source.dtype, self.device, source.has_cpu_order)(matrix)
            if self.slots.bus is not None:
                self.slots.bus.settle()  # what is on its way still is read from here
            for name, plane in source.planes.items():
                target = plane[expert].t() if source.is_transposed else plane[expert]
                target.copy_(planes[name])
            self.slots.refresh(self.half, expert)

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        """The same numbers elsewhere: offloaded again, except where experts in host memory go to a CPU."""
        device = torch.device(device)
        if device.type == "cpu" and self.source.path is None:
            return self.source.resident(device, dtype)
        slots = self.slots.copy_for(self.half, (device, dtype), lambda: self._copied(device, dtype))
        return OffloadedWeights(slots, self.half)

    def codes(self) -> tuple[Codes, ...]:
        """What a kernel reads of the slots: S experts, and not E."""
        return self.slots.weights[self.half].codes()

    def planes(self) -> dict[str, torch.Tensor]:
        """The source's planes, which are not read as a whole; for a file its digest."""
        digest = self.source.digest
        return dict(self.source.planes) if digest is None else {"digest": digest}

    def nbytes(self) -> int:
        """The bytes of the slots, where experts are computed."""
        return self.slots.nbytes(self.half)

    def held_bytes(self) -> int:
        """The bytes of the slots that hold an expert."""
        return self.slots.held_bytes(self.half)

    def __repr__(self) -> str:
        where = self.source.path or "host memory"
        slots = f"{self.slots.num_slots} slots on {self.device}"
        return f"OffloadedWeights({list(self.shape)}, {self.form}, {slots}, {where})"

    def _copied(self, device: torch.device, dtype: torch.dtype) -> ExpertSlots:
        bus = bus_to(device) if device.type != "cpu" and device.type in BUSES else None
        sources = []
        for source in self.slots.sources:
            if source.path is None:
                assert bus is not None
                sources.append(pinned(source, dtype, bus))
            else:
                sources.append(replace(source, dtype=dtype))
        return ExpertSlots(sources[0], sources[1], self.slots.num_slots, self.slots.eviction, device, bus)


def pinned(source: ExpertSource, dtype: torch.dtype, bus: Any) -> ExpertSource:
    """A copy of a source in host memory that a bus reaches at its full speed.

    Raises:
        MemoryError: there is not that much, or it cannot be pinned.
    """
    planes = {}
    for name, plane in source.planes.items():
        planes[name] = bus.allocate(plane.shape, dtype if source.codec == "none" else plane.dtype).copy_(plane)
    return replace(source, planes=planes, dtype=dtype, is_pinned=True)


def run_offloaded(
    experts: Any,
    projections: tuple[Projection, Projection],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    run: Run = run_grouped,
) -> torch.Tensor:
    """Runs the experts of a layer like `run_grouped`, bringing them to slots first.

    Which experts were chosen must be known to the host: it waits for the device once a layer, and no CUDA graph can
    hold it. Where a forward chooses more experts than there are slots it goes in rounds, each with the rows that chose
    its experts, the next round's experts on their way meanwhile. Every row is weighted in its round and rows are summed
    at the end, so that the result does not depend on the number of slots.

    Args:
        experts, projections, hidden_states, top_k_index, top_k_weights: see `run_by_expert`.
        run: the function that computes with the slots.

    Returns:
        `[T, H]`, in the dtype of `hidden_states`.
    """
    weights = projections[0].weights
    assert isinstance(weights, OffloadedWeights)
    slots, num_experts = weights.slots, weights.shape[0]
    ids = top_k_index.cpu().long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    chosen = [expert for expert in ids.unique().tolist() if expert < num_experts]
    with slots.lock:
        rounds = slots.table.rounds(slots.expect(chosen))
        if len(rounds) > 1:
            return _run_rounds(experts, projections, hidden_states, ids, top_k_weights, run, slots, rounds)
        places = slots.bring(chosen)
        index = _slots_of(ids, chosen, places, slots).to(top_k_index)
        out = run(experts, _in_slots(projections, slots), hidden_states, index, top_k_weights)
        slots.release(places)
        return out


def _run_rounds(
    experts: Any,
    projections: tuple[Projection, Projection],
    hidden_states: torch.Tensor,
    ids: torch.Tensor,
    top_k_weights: torch.Tensor,
    run: Run,
    slots: ExpertSlots,
    rounds: list[list[int]],
) -> torch.Tensor:
    top_k, device = ids.shape[1], hidden_states.device
    # float32 holds what a narrower dtype holds: a row is rounded where `run` rounds it, and no more.
    summands = hidden_states.new_zeros(ids.numel(), hidden_states.shape[1], dtype=torch.float32)
    # With a single slot nothing can come before what is there has been computed with.
    is_ahead = slots.num_slots > 1
    sent = slots.send(rounds[0])
    for number, chosen in enumerate(rounds):
        places, copied = sent
        is_last = number + 1 == len(rounds)
        if is_ahead and not is_last:
            sent = slots.send(rounds[number + 1])
        slots.wait(copied)
        index = _slots_of(ids, chosen, places, slots).view(-1)
        own = (index < slots.num_slots).nonzero().view(-1)
        rows, index = own.to(device), index[own, None].to(device)
        given = _in_slots(projections, slots, dict(zip(places, chosen, strict=True)))
        x, row_weights = hidden_states[rows // top_k].float(), top_k_weights.reshape(-1, 1)[rows]
        summands[rows] = run(experts, given, x, index, row_weights)
        slots.release(places)
        if not is_ahead and not is_last:
            sent = slots.send(rounds[number + 1])
    return summands.view(*ids.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _slots_of(ids: torch.Tensor, chosen: list[int], places: list[int], slots: ExpertSlots) -> torch.Tensor:
    """The ids of slots instead of experts, on the CPU; an id of no expert here becomes S."""
    table = torch.full((slots.num_experts + 1,), slots.num_slots)
    table[chosen] = torch.tensor(places, dtype=torch.int64)
    return table[ids]


def _in_slots(
    projections: tuple[Projection, Projection], slots: ExpertSlots, expert_of: dict[int, int] | None = None
) -> tuple[Projection, Projection]:
    """The projections of S slots, with biases and adapters of the experts in them."""
    resident = slots.resident()
    for slot, expert in (expert_of or {}).items():
        resident[slot] = expert  # what is sent ahead is in the table already
    found = []
    for projection, weights in zip(projections, slots.weights, strict=True):
        bias, factors = projection.bias, projection.factors
        if bias is not None or factors:
            at = torch.tensor(resident, device=slots.device)
            bias = None if bias is None else bias[at]
            factors = tuple(Factors(each.a[at], each.b[at], each.scaling) for each in factors)
        found.append(Projection(weights, bias, factors, False))
    return found[0], found[1]
