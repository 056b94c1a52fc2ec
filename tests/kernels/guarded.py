"""Memory that ends before pages that may not be touched."""

from __future__ import annotations

import ctypes
import mmap

import torch


def guarded(plane: torch.Tensor) -> torch.Tensor:
    """A copy of a plane whose last byte is the last before memory that may not be touched."""
    size = plane.numel() * plane.element_size()
    pages = -(-size // mmap.PAGESIZE) + 1
    region = mmap.mmap(-1, pages * mmap.PAGESIZE)
    begin = (pages - 1) * mmap.PAGESIZE - size
    address = ctypes.addressof(ctypes.c_char.from_buffer(region)) + (pages - 1) * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
    bits = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=begin)
    bits.copy_(plane.contiguous().view(torch.uint8).flatten())
    return bits.view(plane.dtype).view(plane.shape)
