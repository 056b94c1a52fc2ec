"""Huge pages: the system's larger pages of memory, for planes that are read from end to end at every step."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch

# Bytes of a huge page, on the processors that are common; and from how many on a tensor is worth it: smaller ones are
# found among the addresses that a processor remembers anyway.
PAGE = 1 << 21
LEAST = 4 * PAGE


def advise(memory: torch.Tensor) -> None:
    """Asks the system for huge pages where a CPU's tensor has not been written yet, from `LEAST` bytes on.

    A step that reads all of a long cache waits for the translation of addresses: one layer of 32k int8 tokens, 8 kv
    heads of 128, takes 2.1 to 2.2 ms instead of 2.5 to 2.9 (2 cores of an EPYC, virtual). Linux gives such pages where
    it is asked (its default), and only for what is written: what is reserved becomes resident by 2 MiB at a time.
    """
    if memory.device.type != "cpu" or memory.nbytes < LEAST:
        return
    ask = _madvise()
    if ask is not None:
        begin = -(-memory.data_ptr() // PAGE) * PAGE
        # A system that has no such pages says so, and nothing is lost.
        ask(begin, (memory.data_ptr() + memory.nbytes) // PAGE * PAGE - begin, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function; None on systems other than Linux."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
