"""Experts that are brought to slots: the same numbers as resident ones, and no byte more than must travel."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfkv.experts.adapters import Factors
from hfkv.experts.by_expert import run_by_expert
from hfkv.experts.config import MoEConfig
from hfkv.experts.implementation import experts_forward
from hfkv.experts.offload.expert_source import ExpertSource
from hfkv.experts.offload.offloaded import run_offloaded
from hfkv.experts.offload.place import offload_experts
from hfkv.experts.offload.slots import ExpertSlots
from hfkv.experts.offload.trace import ExpertTrace, replay
from hfkv.experts.projection import Projection
from hfkv.stores.offload.bus import Bus, bus_to
from tests.experts_to_offload import (
    CODECS,
    CPU,
    E,
    H,
    K,
    behind_a_bus,
    matrices_of,
    module,
    offloaded,
    projections,
    resident,
    tokens,
    with_weights,
)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_slots", [K, 3, E])
def test_slots_written_by_the_host_compute_what_resident_experts_do(codec: str, num_slots: int, tmp_path: Path) -> None:
    experts = module()
    there = with_weights(experts, resident(experts, codec))
    pair = offloaded(experts, codec, num_slots, tmp_path)
    away = with_weights(experts, pair)
    for count in (1, 7, 100, 0, 1):
        x = tokens(count)
        assert torch.equal(experts_forward(away, *x), experts_forward(there, *x))
    assert pair[0].form == f"offloaded {'plain' if codec == 'none' else codec}"
    assert pair[0].nbytes() == num_slots * resident(experts, codec)[0].nbytes() // E


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_slots", [1, K, 3, 4, E])
@pytest.mark.parametrize("is_pinned", [True, False])
def test_slots_behind_a_bus_compute_what_resident_experts_do(codec: str, num_slots: int, is_pinned: bool) -> None:
    experts = module()
    up, down = (Projection(weights, None, (), False) for weights in resident(experts, codec, is_packed=False))
    slots = behind_a_bus(experts, codec, num_slots, is_pinned=is_pinned)
    for count in (7, 100, 7, 0) if num_slots < K else (1, 7, 100, 1, 0):
        x = tokens(count)
        expected = run_by_expert(experts, (up, down), *x)
        assert torch.equal(run_offloaded(experts, projections(slots), *x, run=run_by_expert), expected)
    assert slots.bus is not None
    assert slots.bus.bytes_to_device == slots.layer.bytes_moved == slots.table.counts.misses * slots.expert_bytes


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, E), min_size=K, max_size=5 * K), min_size=1, max_size=6),
    st.integers(K, E),
    st.sampled_from(["lru", "lfu", "fifo"]),
    st.sampled_from(CODECS),
)
def test_any_choices_of_experts_move_what_a_replay_says(
    forwards: list[list[int]], num_slots: int, eviction: str, codec: str
) -> None:
    experts = module()
    expected_pair = tuple(Projection(weights, None, (), False) for weights in resident(experts, codec, is_packed=False))
    slots = behind_a_bus(experts, codec, num_slots, eviction)
    before = slots.bus.bytes_to_device  # type: ignore[union-attr]
    trace = ExpertTrace()
    trace.add("layer", slots.layer)
    trace.record()
    for forward in forwards:
        # E is the id of what another process computes.
        index = torch.tensor(forward[: len(forward) // K * K]).view(-1, K)
        x = torch.randn(len(index), H).bfloat16(), index, torch.rand(len(index), K).bfloat16()
        out = run_offloaded(experts, projections(slots), *x, run=run_by_expert)
        assert torch.equal(out, run_by_expert(experts, expected_pair, *x))  # type: ignore[arg-type]
        assert len(slots.table.slot_of) <= num_slots == slots.weights[0].shape[0]
    moved = slots.bus.bytes_to_device - before  # type: ignore[union-attr]
    replayed = replay(trace, eviction, num_slots) if any(slots.layer.forwards) else None
    assert moved == trace.bytes_moved() == (replayed.bytes_moved if replayed else 0)
    assert replayed is None or replayed.counts["layer"] == slots.table.counts


def test_host_and_device_count_alike(tmp_path: Path) -> None:
    experts = module()
    pair = offloaded(experts, "int8", 3, tmp_path)
    away, slots = with_weights(experts, pair), behind_a_bus(experts, "int8", 3)
    for count in (1, 5, 1, 40, 2):
        x = tokens(count)
        experts_forward(away, *x)
        run_offloaded(experts, projections(slots), *x, run=run_by_expert)
        assert pair[0].slots.table.counts == slots.table.counts
    assert pair[0].held_bytes() == pair[0].nbytes()


class Marked(Bus):
    """Takes down what each copy waits for."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.time = 0
        self.waited: list[int] = []

    def mark(self) -> int:
        self.time += 1
        return self.time

    def to_device(self, copies: Any, after: Any = None) -> int:
        self.waited.append(after)
        super().to_device(copies, after)
        return len(self.waited)


def test_a_slot_is_written_to_behind_what_reads_it_and_behind_nothing_else() -> None:
    slots = behind_a_bus(module(), "int8", 4)
    slots.bus = bus = Marked()
    slots.expect([0, 1])
    for expert in (0, 1):
        slots.release(slots.bring([expert]))
    first, second = 1, 2  # the marks of what read them
    slots.expect([2, 3])
    slots.bring([2, 3])
    bus.waited.clear()
    slots.expect([4, 5])
    slots.send([4])
    assert bus.waited == [first]
    slots.send([5])
    assert bus.waited == [first, second]


def test_what_two_threads_read_is_waited_for_in_both() -> None:
    slots = behind_a_bus(module(), "int8", K)
    slots.bus = bus = Marked()
    places = slots.bring([0])
    slots.release(places)
    other = threading.Thread(target=slots.release, args=(places,))
    other.start()
    other.join()
    slots.bring([1])
    bus.waited.clear()
    slots.expect([1, 2])
    slots.bring([1, 2])
    assert sorted(bus.waited)[-2:] == [1, 2]


def test_threads_share_a_layer(tmp_path: Path) -> None:
    experts = module()
    there = with_weights(experts, resident(experts, "int8"))
    away = with_weights(experts, offloaded(experts, "int8", K, tmp_path))
    inputs = [[tokens(count) for count in (1, 5, 9) * 4] for _ in range(3)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for x in inputs[number]:
            if not torch.equal(experts_forward(away, *x), experts_forward(there, *x)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("codec", CODECS)
def test_biases_and_transposed_matrices(codec: str, tmp_path: Path) -> None:
    experts = module(kind="gpt_oss")
    pair = resident(experts, codec, is_packed=False)
    biases = experts.gate_up_proj_bias, experts.down_proj_bias
    expected = tuple(Projection(pair[half], biases[half], (), False) for half in (0, 1))
    slots = behind_a_bus(experts, codec, 3)
    for count in (1, 30):
        x = tokens(count)
        out = run_offloaded(experts, projections(slots, biases), *x, run=run_by_expert)
        assert torch.equal(out, run_by_expert(experts, expected, *x))  # type: ignore[arg-type]
    there = with_weights(experts, resident(experts, codec))
    away = with_weights(experts, offloaded(experts, codec, 3, tmp_path))
    assert away.gate_up_proj.shape == experts.gate_up_proj.shape
    assert torch.equal(experts_forward(away, *x), experts_forward(there, *x))


def test_adapters_are_those_of_the_experts_in_the_slots() -> None:
    experts = module(torch.float32)
    pair = resident(experts, "int8")
    factors = tuple(
        (Factors(torch.randn(E, 3, weights.shape[2]), torch.randn(E, weights.shape[1], 3), 0.5),) for weights in pair
    )
    slots = behind_a_bus(experts, "int8", 3)
    expected = tuple(Projection(pair[half], None, factors[half], False) for half in (0, 1))
    for count in (1, 30):
        x = tokens(count, torch.float32)
        out = run_offloaded(experts, projections(slots, factors=factors), *x, run=run_by_expert)
        assert torch.equal(out, run_by_expert(experts, expected, *x))  # type: ignore[arg-type]


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
def test_hits_of_a_layer_by_hand(eviction: str, tmp_path: Path) -> None:
    experts = module()
    pair = offloaded(experts, "int8", 3, tmp_path, eviction=eviction)
    away = with_weights(experts, pair)
    # 0 and 1 come; 0 and 2 use 0 again; then 3 and 4 drive out two of 0, 1, 2.
    for chosen in ([0, 1], [0, 2], [3, 4]):
        x, _, weights = tokens(1)
        experts_forward(away, x, torch.tensor([chosen]), weights)
    assert (pair[0].slots.table.counts.hits, pair[0].slots.table.counts.misses) == (1, 5)
    stays = {"lru": 2, "lfu": 0, "fifo": 2}[eviction]
    assert set(pair[0].slots.table.slot_of) == {stays, 3, 4}


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize(("codec", "num_slots"), list(itertools.product(CODECS, [K, 3, E])))
def test_on_a_gpu_slots_compute_what_resident_experts_do(codec: str, num_slots: int, tmp_path: Path) -> None:
    experts = module().cuda()
    there = with_weights(experts, resident(experts, codec))
    config = MoEConfig(codec=codec, offload=True)
    away = with_weights(experts, offload_experts(experts, config, num_slots))
    from_file = with_weights(experts, offloaded(experts, codec, num_slots, tmp_path))
    for count in (1, 7, 100, 1, 0):
        x = [tensor.cuda() for tensor in tokens(count)]
        expected = experts_forward(there, *x)
        for other in (away, from_file):
            assert torch.equal(experts_forward(other, *x), expected)


@gpu
def test_on_a_gpu_only_slots_take_memory() -> None:
    experts = module().cpu()
    before = torch.cuda.memory_allocated()
    slots = ExpertSlots(*(_pinned(experts, half) for half in (0, 1)), K, "lru", torch.device("cuda"), _cuda_bus())
    for _ in range(20):
        x = [tensor.cuda() for tensor in tokens(50)]
        run_offloaded(experts.cuda(), projections(slots), *x)
    torch.cuda.synchronize()
    del x
    taken = torch.cuda.memory_allocated() - before - sum(p.nbytes for p in experts.parameters())
    assert taken <= sum(slots.nbytes(half) for half in (0, 1)) + 2**16


@gpu
def test_on_a_gpu_slots_are_overwritten_only_once_they_were_read() -> None:
    experts = module(torch.float32).cuda()
    up, down = (Projection(weights, None, (), False) for weights in resident(experts, "none"))
    slots = ExpertSlots(*(_pinned(experts, half) for half in (0, 1)), K, "lru", torch.device("cuda"), _cuda_bus())
    inputs = [[tensor.cuda() for tensor in tokens(200, torch.float32)] for _ in range(10)]
    busy = torch.randn(4096, 4096, device="cuda")
    for x in inputs:
        busy = busy @ busy.sigmoid()  # keeps the device behind the host
        out = run_offloaded(experts, projections(slots), *x)
        torch.testing.assert_close(out, run_by_expert(experts, (up, down), *x), atol=1e-3, rtol=1e-3)


def _cuda_bus() -> Bus:
    return bus_to(torch.device("cuda"))


def _pinned(experts: Any, half: int) -> ExpertSource:
    matrices = matrices_of(experts)[half].cpu()
    plane = _cuda_bus().allocate(matrices.shape, matrices.dtype).copy_(matrices)
    return ExpertSource("none", tuple(matrices.shape), matrices.dtype, {"matrices": plane}, is_pinned=True)
