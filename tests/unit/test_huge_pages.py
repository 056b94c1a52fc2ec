"""Long planes of a CPU lie in memory for which huge pages were asked, and nothing else does."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from hfkv.stores import huge_pages
from hfkv.stores.planes import allocate

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no transparent huge pages",
)
CPU = torch.device("cpu")


def is_advised(address: int) -> bool:
    """Whether huge pages were asked for the memory at an address, as the system tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{address:#x} is not in memory")


@pytest.mark.parametrize("tokens_innermost", [False, True])
def test_planes_that_are_long_have_huge_pages(tokens_innermost: bool) -> None:
    plane = allocate((1, 8, 1 << 14, 128), torch.int8, CPU, tokens_innermost)
    assert is_advised(plane.data_ptr() + plane.nbytes // 2)


def test_what_lies_around_them_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *of: asked.append(of))
    allocate((1, 1, huge_pages.LEAST - 1, 1), torch.int8, CPU)
    allocate((1, 1, 1 << 24, 1), torch.int8, torch.device("meta"))
    assert not asked
    plane = allocate((1, 1, huge_pages.LEAST + 100, 1), torch.int8, CPU)
    ((begin, size, advice),) = asked
    assert begin % huge_pages.PAGE == size % huge_pages.PAGE == 0
    assert plane.data_ptr() <= begin < begin + size <= plane.data_ptr() + plane.nbytes
    assert size > plane.nbytes - 2 * huge_pages.PAGE
    assert advice == mmap.MADV_HUGEPAGE


def test_a_system_without_them_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert allocate((1, 1, huge_pages.LEAST, 1), torch.int8, CPU).nbytes == huge_pages.LEAST
