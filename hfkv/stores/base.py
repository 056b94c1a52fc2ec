"""What every store promises, and how it allocates."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hfkv.measure.allocated import storage_bytes
from hfkv.stores.layout import Layout

logger = logging.getLogger("hfkv")

Planes = tuple[torch.Tensor, ...]

# Appending one token at a time copies each byte O(1) times, and never holds more than 1.25 x what is used.
GROWTH = 1.25


class Run(NamedTuple):
    """Some of the tokens held, one after the other, as they lie on the device.

    Attributes:
        planes: they are in these.
        layout: where, counted from the first of them.
        begin: its index among all tokens held.
    """

    planes: Planes
    layout: Layout
    begin: int


class PlaneBytes(NamedTuple):
    """What one plane of a store takes on one device.

    Attributes:
        plane: its index among the store's planes.
        device: where.
        allocated: bytes.
        held: bytes of these that tokens are in, shared ones counted once.
    """

    plane: int
    device: torch.device
    allocated: int
    held: int


class Store(ABC):
    """Holds a sequence of tokens for each of B rows, as planes `[B, H_i, T, d_i]` it does not interpret.

    All rows hold the same number of tokens. Planes may differ in heads, width and dtype.

    Args:
        bound: the number of tokens held between two steps, where a window limits it; None without a limit.
    """

    def __init__(self, *, bound: int | None = None) -> None:
        self.bound = bound
        self.length = 0
        self.reserved = 0
        self.version = 0  # changes when a token that was held moves or goes
        self.keeps_place = False  # whether `select` writes to the same planes where it can: a CUDA graph reads them
        self.planes: list[torch.Tensor] = []
        self.device: torch.device | None = None

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Held while planes are written that other stores may share."""
        return contextlib.nullcontext()

    @property
    def home(self) -> torch.device | None:
        """Where what is held grows: the compute device, or the host where most of it is kept there."""
        return self.device

    # Whether copies of a row share pages, and whether some of it lies in another memory than where it is computed with.
    is_paged = False
    is_offloaded = False

    def expect_copies(self, copies: int, tokens: int) -> None:  # noqa: B027 - most stores have no use for it
        """Says that every row will be copied so many times when it holds `tokens`, so that one allocation is enough."""

    def move(self, place: Any) -> None:  # noqa: B027 - what is not offloaded has no buffers
        """Uses the buffers of another cache from here on, where it is offloaded: this one is a fork's."""

    @property
    def reads_slices(self) -> bool:
        """Whether `read` returns slices of the planes themselves: free, and not contiguous."""
        return False

    @abstractmethod
    def append(self, new: Planes) -> None:
        """Adds tokens at the end of every row: planes `[B, H_i, T, d_i]`, T may be 0."""

    @abstractmethod
    def extend(self, count: int) -> Layout:
        """Adds `count` tokens at the end of every row and leaves it to the caller to write them, once there are planes.

        Returns:
            Where those before them lie, with a block table that has the columns of the new ones too.
        """

    @abstractmethod
    def drop(self, start: int, stop: int) -> None:
        """Removes the held tokens `start <= i < stop`, counted from the first held one."""

    @abstractmethod
    def write(self, start: int, new: Planes) -> None:
        """Replaces the held tokens `start ..` of every row, counted from the first held one, by `[B, H_i, T, d_i]`."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Makes row i a copy of the present row `rows[i]`; `rows` is int64 `[B']` on any device."""

    @abstractmethod
    def fork(self, rows: torch.Tensor) -> Store:
        """A store of its own whose row i holds what row `rows[i]` of this one does; `rows` is int64 `[B']`."""

    @abstractmethod
    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        """Held tokens in order, `[rows, H_i, last - first, d_i]`, on the compute device; not to be written to.

        Args:
            which: the planes to read.
            first, last: the tokens to read, counted from the first held one; all by default.
            rows: whose; all by default.
        """

    @abstractmethod
    def layout(self) -> Layout:
        """Where the held tokens lie in `planes`."""

    def runs(self, last: int, first: int = 0, uncut: int = 0) -> Iterator[Run]:
        """The tokens `first .. last - 1`, and what lies beside them, in runs to be read before the next is asked for.

        Args:
            last, first: counted from the first token held.
            uncut: so many tokens at the front are to be in one run.
        """
        layout = self.layout()
        yield Run(tuple(self.planes), layout if layout.length == last else replace(layout, length=last), 0)

    @abstractmethod
    def held_tokens(self) -> int:
        """Tokens held in all rows, shared ones counted once."""

    def held_bytes(self) -> int:
        """Bytes of the tokens held, shared ones counted once."""
        return self.held_tokens() * sum(token_bytes(plane) for plane in self.planes)

    def memory(self) -> list[PlaneBytes]:
        """Where the bytes of each plane are."""
        tokens = self.held_tokens()
        return [
            PlaneBytes(index, plane.device, storage_bytes((plane,)), tokens * token_bytes(plane))
            for index, plane in enumerate(self.planes)
        ]

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        self.drop(length, self.length)

    def reserve(self, tokens: int) -> None:
        """Says how many tokens a row will hold in all, so that the next allocation is the last."""
        self.reserved = max(self.reserved, tokens)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return storage_bytes(self.planes)

    def allocate(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised plane of `like`'s dtype in this store's memory.

        Raises:
            MemoryError: there is not that much.
        """
        assert self.device is not None
        return allocate(shape, like.dtype, self.device)

    def allocate_reserved(self, needed: int, wanted: int, allocate: Callable[[int], None]) -> None:
        """Calls `allocate(wanted)`, or, where the memory for a reservation is not there, `allocate(needed)`."""
        try:
            allocate(wanted)
        except MemoryError as error:
            if wanted <= needed:
                raise
            logger.warning("no room to reserve what max_length asks for, growing step by step instead: %s", error)
            self.reserved = 0
            allocate(needed)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for keys and values.

    Raises:
        MemoryError: there is not that much.
    """
    # A cache filled under inference_mode may go on outside it: its planes must be ordinary tensors.
    with torch.inference_mode(False):
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise no_memory(torch.Size(shape).numel() * dtype.itemsize, str(device), error) from error


def no_memory(num_bytes: int, where: str, error: Exception) -> MemoryError:
    """The error of bytes for keys and values that are not to be had."""
    return MemoryError(
        f"could not allocate {num_bytes:,} bytes for keys and values in {where} ({str(error).splitlines()[0]}); use a "
        "smaller codec, a window, offload or a shorter context"
    )


def token_bytes(plane: torch.Tensor) -> int:
    """The bytes of one token of a plane `[.., H, T, d]`."""
    return plane.shape[1] * plane.shape[3] * plane.element_size()
