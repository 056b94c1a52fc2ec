"""`LazyBus`: a bus between two parts of one memory, for machines without an accelerator."""

from __future__ import annotations

import threading
from typing import Any

import torch

from hfkv.stores.offload.bus import Bus, Copies
from hfkv.stores.planes import has_tokens_innermost


class LazyBus(Bus):
    """Copies as late as the one who asked allows: what is read too early, or written too early, is wrong."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0
        self._marks = 0
        self._lock = threading.RLock()

    def mark(self) -> int:
        self._marks += 1
        return self._marks

    def to_device(self, copies: Copies, after: Any = None) -> int:
        assert after is not None, "memory is written to that others may still be computing with"
        with self._lock:
            super().to_device(copies, after)
            for _, target in copies:
                in_one_piece(target).view(torch.uint8).fill_(0x7F)  # a NaN in every float
            return self._done + len(self._waiting)

    def wait(self, copied: Any) -> None:
        with self._lock:
            if copied is not None:
                self._run(copied - self._done)

    def settle(self) -> None:
        self._run(len(self._waiting))

    def _copy(self, copies: Copies, after: Any = None) -> None:
        for source, target in copies:
            pieces = in_one_piece(source), in_one_piece(target)  # one `memcpy` does it
            assert pieces[0].shape == pieces[1].shape
        with self._lock:
            self._waiting += copies

    def _run(self, count: int) -> None:
        with self._lock:
            for source, target in self._waiting[: max(count, 0)]:
                target.copy_(source)
            del self._waiting[: max(count, 0)]
            self._done += max(count, 0)


def in_one_piece(plane: torch.Tensor) -> torch.Tensor:
    """A plane as contiguous memory; with tokens innermost, their numbers are apart."""
    memory = plane.transpose(-1, -2) if plane.dim() > 1 and has_tokens_innermost(plane) else plane
    assert memory.is_contiguous()
    return memory
