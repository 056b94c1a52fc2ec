"""`Bus`: copies between host memory and one device, and their bytes counted."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (source, target), both of one shape and order, in one piece


class Bus:
    """Copies between host memory and a device, one after the other in the order of the calls.

    This class waits for each copy. The result of `mark` stands for everything that the device has been asked to compute
    so far, the result of `to_device` for every copy that the bus has been asked for.

    Args:
        device: device at the other end.

    Attributes:
        bytes_to_host, bytes_to_device: number of bytes moved so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes_to_host = 0
        self.bytes_to_device = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocates uninitialised host memory that the bus reaches at full speed, exactly as many bytes as asked for.

        Raises:
            MemoryError: there is not enough memory.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        # The system may promise memory that it does not have, and kill a process that writes to it: refuse before.
        available = psutil.virtual_memory().available
        if num_bytes > available:
            raise MemoryError(f"{num_bytes:,} bytes were asked for and {available:,} bytes of host memory are free")
        try:
            return self._allocate(shape, dtype, num_bytes)
        except (OSError, RuntimeError, ValueError) as error:
            raise MemoryError(f"{num_bytes:,} bytes of host memory: {str(error).splitlines()[0]}") from error

    def mark(self) -> Any:
        """A mark that stands for everything that the device has been asked to compute so far."""
        return None

    def to_host(self, copies: Copies) -> None:
        """Copies to the host, after everything that the device has been asked to compute so far."""
        self.bytes_to_host += _total(copies)
        self._copy(copies)

    def to_device(self, copies: Copies, after: Any = None) -> Any:
        """Copies to the device.

        Args:
            copies: sources and targets of the copies.
            after: mark of the computation that must be done before the targets are written to.

        Returns:
            The argument for `wait`.
        """
        self.bytes_to_device += _total(copies)
        self._copy(copies, after)
        return None

    def wait(self, copied: Any) -> None:
        """Makes everything that the device is asked to compute from here on wait for the copies."""

    def settle(self) -> None:
        """Waits for all copies: after it, host code may read and write host memory."""

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, num_bytes: int) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def _copy(self, copies: Copies, after: Any = None) -> None:
        for source, target in copies:
            target.copy_(source)


class CudaBus(Bus):
    """Bus that copies on a stream of its own, while the device computes.

    Both directions share the stream: a page is written to the host before it is read back, whichever store asks. Host
    memory is pinned by registering it: torch's allocator of pinned memory rounds up to powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def to_host(self, copies: Copies) -> None:
        self._stream.wait_event(self.mark())
        super().to_host(copies)

    def to_device(self, copies: Copies, after: Any = None) -> torch.cuda.Event:
        super().to_device(copies, after)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, copied: Any) -> None:
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def settle(self) -> None:
        self._stream.synchronize()

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, num_bytes: int) -> torch.Tensor:
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        with torch.cuda.device(self.device):
            memory = _PinnedMemory(num_bytes, self.settle)
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))

    def _copy(self, copies: Copies, after: Any = None) -> None:
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
                for tensor in (source, target):
                    if tensor.device.type == "cuda":
                        # Freed earlier, its memory would be given to others while the copy is on its way.
                        tensor.record_stream(self._stream)


class _PinnedMemory(mmap.mmap):
    """Anonymous memory, page-locked as long as it lives."""

    def __new__(cls, num_bytes: int, settle: Callable[[], None]) -> _PinnedMemory:
        # By default it would be shared with processes that are forked, which must not touch what is pinned here.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = super().__new__(cls, -1, num_bytes, **private)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                memory.madvise(getattr(mmap, advice))
        memory._settle = settle
        memory._address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        error = torch.cuda.cudart().cudaHostRegister(memory._address, num_bytes, 0)
        if int(error) != 0:
            memory._address = 0
            raise RuntimeError(
                f"it cannot be pinned (cudaHostRegister: {error}). Allow the process to lock more memory (ulimit -l), "
                "or use a smaller codec, a larger device_budget or a shorter context"
            )
        return memory

    def __init__(self, num_bytes: int, settle: Callable[[], None]) -> None:
        """Does nothing: `__new__` has done it."""

    _address = 0
    _settle: Callable[[], None]

    def __del__(self) -> None:
        if self._address:
            self._settle()  # pages may be on their way still
            torch.cuda.cudart().cudaHostUnregister(self._address)


def _total(copies: Copies) -> int:
    return sum(target.numel() * target.element_size() for _, target in copies)


# Device type -> its bus from host memory; devices of other types compute in host memory.
BUSES: dict[str, Callable[[torch.device], Bus]] = {"cuda": CudaBus, "xpu": Bus}


_buses: dict[torch.device, Bus] = {}
_lock = threading.Lock()


def bus_to(device: torch.device) -> Bus:
    """The bus to `device`, one for all stores: copies of one page keep their order, whichever store asks for them."""
    with _lock:
        if device not in _buses:
            _buses[device] = BUSES[device.type](device)
        return _buses[device]


def is_apart(device: torch.device) -> bool:
    """Whether a device has memory of its own; without it there is nothing to move."""
    return device.type in BUSES
