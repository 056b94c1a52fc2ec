"""Pinned host memory, with the driver's two calls replaced: that it is asked for exactly, and given back."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

from hfkv.stores.offload.bus import Bus, CudaBus, bus_to, is_apart
from hfkv.stores.offload.host import HostPages


class Driver:
    """`torch.cuda.cudart()`."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        if self.result == 0:
            self.pinned[address] = num_bytes
        return self.result

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


class Stream:
    settled = 0

    def __init__(self, device: torch.device) -> None:
        Stream.settled = 0

    def synchronize(self) -> None:
        Stream.settled += 1


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> CudaBus:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return CudaBus(torch.device("cuda"))


def drive(monkeypatch: pytest.MonkeyPatch, result: int = 0) -> Driver:
    driver = Driver(result)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


@pytest.mark.parametrize("shape", [(3, 8, 64, 128), (1,), (0, 2, 4, 8)])
def test_memory_is_pinned_without_waste_and_given_back(
    monkeypatch: pytest.MonkeyPatch, bus: CudaBus, shape: tuple[int, ...]
) -> None:
    driver = drive(monkeypatch)
    plane = bus.allocate(shape, torch.bfloat16)
    assert (plane.shape, plane.dtype) == (shape, torch.bfloat16)
    assert sum(driver.pinned.values()) == plane.numel() * 2
    assert set(driver.pinned) <= {plane.data_ptr()}
    part = plane[:1].fill_(7)
    del plane
    gc.collect()
    assert bool(driver.pinned) == bool(part.numel())
    assert bool((part == 7).all())
    settled, was_pinned = Stream.settled, len(driver.pinned)
    del part
    gc.collect()
    assert not driver.pinned
    assert Stream.settled == settled + was_pinned  # pages may be on their way when a cache goes


def test_memory_that_cannot_be_pinned_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch, bus: CudaBus) -> None:
    drive(monkeypatch, result=2)
    pages = HostPages(bus, [torch.empty(0, 2, 4, 8)])
    with pytest.raises(MemoryError, match=r"512 bytes .* host memory .*cannot be pinned .*ulimit -l"):
        pages.make_room(2)
    assert (pages.size, pages.free, pages.segments) == (0, [], [])


def test_more_than_there_is_is_refused_before_it_is_taken() -> None:
    with pytest.raises(MemoryError, match="bytes of host memory are free"):
        Bus(torch.device("cpu")).allocate((1 << 50,), torch.uint8)


def test_there_is_one_bus_to_a_device() -> None:
    device = torch.device("cpu")
    assert is_apart(device)  # in these tests
    assert not is_apart(torch.device("meta"))
    assert bus_to(device) is bus_to(torch.device("cpu"))


def test_slots_come_in_order_and_go_back_in_segments() -> None:
    pages = HostPages(Bus(torch.device("cpu")), [torch.empty(0, 1, 2, 3), torch.empty(0, 1, 2, 1, dtype=torch.int8)])
    pages.make_room(3)
    first = pages.take(3)
    pages.make_room(2, expected=9)
    assert (first, pages.size, pages.take(2)) == ([0, 1, 2], 9, [3, 4])
    assert [(start, len(planes[0])) for start, planes in pages.runs([1, 2, 3, 4, 0])] == [(0, 2), (2, 2), (4, 1)]
    pages.release([3, 4])
    pages.trim()
    assert (pages.size, pages.free) == (3, [])
    pages.release([1])
    assert pages.take(1) == [1]


def sends(pages: HostPages, slots: list[int], content: Any) -> None:
    pages.send([(index, slot) for index, slot in enumerate(slots)], content)


def test_pages_come_back_as_they_were_sent() -> None:
    pages = HostPages(Bus(torch.device("cpu")), [torch.empty(0, 1, 2, 3)])
    for count in (2, 3, 1):
        pages.make_room(len(pages.free) + count)
    content = torch.randn(6, 1, 2, 3)
    slots = [5, 0, 1, 4, 2, 3]
    sends(pages, slots, [content])
    into = torch.empty(6, 1, 2, 3)
    pages.load([(slot, slot) for slot in range(6)], [into])
    assert torch.equal(into[slots], content)
