"""`Store`: the interface of every store, and how stores allocate memory."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hfkv.measure.allocated import storage_bytes
from hfkv.stores.layout import Layout
from hfkv.stores.pickling import from_pickle, to_pickle
from hfkv.stores.planes import allocate, has_tokens_innermost, token_bytes

logger = logging.getLogger("hfkv")

Planes = tuple[torch.Tensor, ...]

# Appending one token at a time copies each byte O(1) times, and never holds more than 1.25 x what is used.
GROWTH = 1.25


class Run(NamedTuple):
    """A run of held tokens, one after the other, as they lie on the device.

    Attributes:
        planes: planes that hold the tokens.
        layout: places of the tokens in the planes, counted from the first token of the run.
        begin: index of the first token among all tokens held.
    """

    planes: Planes
    layout: Layout
    begin: int


class Placing:
    """The places of new tokens, for stores whose tokens lie alike: worked out once; see `Store.placing`.

    Attributes:
        before: layout of the tokens before the new ones, once those that are to go have gone; a block table has the
            new tokens' columns too.
        start: slots before the first token afterwards; contiguous planes only.
        front, gap: tokens at the front that move over those that go, and how many slots further; see `Store.shift`.
        copies: whether pages that others list too are copied before they are written to.
    """

    __slots__ = ("before", "start")

    before: Layout
    start: int
    front: int = 0
    gap: int = 0
    copies: bool = False


class PlaneBytes(NamedTuple):
    """The bytes that one plane of a store takes on one device.

    Attributes:
        plane: index of the plane among the store's planes.
        device: device of the bytes.
        allocated: number of bytes allocated.
        held: number of these bytes that hold tokens, shared ones counted once.
    """

    plane: int
    device: torch.device
    allocated: int
    held: int


class Store(ABC):
    """Holds a sequence of tokens for each of B rows, as planes `[B, H_i, T, d_i]` it does not interpret.

    All rows hold the same number of tokens. Planes may differ in heads, width and dtype.

    Args:
        bound: number of tokens to which a window limits a row between two steps; None without a limit.
        tokens_innermost: indices of the planes whose tokens lie side by side, for kernels that read them so; in the
            others, the numbers of a token do.
    """

    def __init__(self, *, bound: int | None = None, tokens_innermost: tuple[int, ...] = ()) -> None:
        self.bound, self.tokens_innermost = bound, tokens_innermost
        self.length = 0
        self.reserved = 0
        self.version = 0  # changes when a token that was held moves or goes
        self.keeps_place = False  # whether `select` writes to the same planes where it can: a CUDA graph reads them
        self.planes: list[torch.Tensor] = []
        self.lent: list[torch.Tensor] = []  # planes of a store that is gone, for the first allocation
        self.device: torch.device | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        return state | {"planes": to_pickle(state["planes"])} if "planes" in state else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"planes": from_pickle(state["planes"])} if "planes" in state else state)

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """The lock to hold while planes are written that other stores may share."""
        return contextlib.nullcontext()

    @property
    def home(self) -> torch.device | None:
        """The device on which the held tokens grow: the compute device, or the host for an offloaded store."""
        return self.device

    # Whether copies of a row share pages, and whether some tokens lie in other memory than the compute device's.
    is_paged = False
    is_offloaded = False

    def expect_copies(self, copies: int, tokens: int) -> None:  # noqa: B027 - most stores have no use for it
        """Announces `copies` copies of every row for when it holds `tokens`, so that one allocation is enough."""

    def move(self, place: Any) -> None:  # noqa: B027 - what is not offloaded has no buffers
        """Switches to the buffers of another cache, a fork, if the store is offloaded."""

    @property
    def reads_slices(self) -> bool:
        """Whether `read` returns slices of the planes themselves, which are free and not contiguous."""
        return False

    @abstractmethod
    def append(self, new: Planes) -> None:
        """Adds tokens at the end of every row: planes `[B, H_i, T, d_i]`, T may be 0."""

    @abstractmethod
    def extend(self, count: int) -> Layout:
        """Adds `count` tokens at the end of every row, which the caller writes; there must be planes already.

        Returns:
            The layout of the tokens before them, with a block table that has the new tokens' columns too.
        """

    @property
    def has_shared_end(self) -> bool:
        """Whether the last token lies in a page that somebody else lists too."""
        return False

    @property
    def extent(self) -> object:
        """The places of the tokens, to compare: stores of equal extents do the same when tokens come or go."""
        return None

    def placing(self, count: int, start: int, stop: int) -> Placing | None:
        """Works out how to drop the tokens `start .. stop - 1`, and to add `count` behind those that are left.

        Returns:
            What `put` of every store of this extent takes; None where `drop` and
            `append` have more to do than write.
        """
        return None

    def put(self, placing: Placing, new: Planes | None) -> None:
        """Does what `placing` says, with new tokens `[B, H_i, count, d_i]`; None leaves all writing to the caller."""
        raise NotImplementedError

    def shift(self, placing: Placing) -> None:  # noqa: B027 - most stores move nothing
        """Moves the tokens at the front that are to move, for a caller that writes the new ones."""

    def read_placed(self, placing: Placing, first: int, last: int) -> Planes:
        """Reads tokens after `put`, as `read` does; what is alike in all stores is worked out once."""
        return self.read(slice(None), first, last)

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
        """Copies the store: row i of the copy holds what row `rows[i]` of this one does; `rows` is int64 `[B']`."""

    @abstractmethod
    def read(
        self, which: slice = slice(None), first: int = 0, last: int | None = None, rows: slice = slice(None)
    ) -> Planes:
        """Reads held tokens in order, `[rows, H_i, last - first, d_i]`, on the compute device; not to be written to.

        Args:
            which: the planes to read.
            first, last: the tokens to read, counted from the first held one; all by default.
            rows: the rows to read; all by default.
        """

    @abstractmethod
    def layout(self) -> Layout:
        """The layout of the held tokens in `planes`."""

    def runs(self, last: int, first: int = 0, uncut: int = 0) -> Iterator[Run]:
        """Yields the tokens `first .. last - 1`, and others beside them, in runs; read one before asking for the next.

        Args:
            last, first: bounds of the tokens, counted from the first token held.
            uncut: number of tokens at the front that must be in one run.
        """
        layout = self.layout()
        yield Run(tuple(self.planes), layout if layout.length == last else replace(layout, length=last), 0)

    @abstractmethod
    def held_tokens(self) -> int:
        """The number of tokens held in all rows, shared ones counted once."""

    def held_bytes(self) -> int:
        """Bytes of the tokens held, shared ones counted once."""
        return self.held_tokens() * sum(token_bytes(plane) for plane in self.planes)

    def memory(self) -> list[PlaneBytes]:
        """The bytes of each plane on each device."""
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
        """Allocates an uninitialised plane in the dtype and the order of another, in this store's memory.

        Raises:
            MemoryError: there is not enough memory.
        """
        assert self.device is not None
        return allocate(shape, like.dtype, self.device, has_tokens_innermost(like))

    def blanks(self, like: Sequence[torch.Tensor], rows: int, tokens: int) -> list[torch.Tensor]:
        """Allocates planes `[rows, H_i, tokens, d_i]` for tokens like those given, each in its order."""
        assert self.device is not None
        return [
            allocate((rows, p.shape[1], tokens, p.shape[3]), p.dtype, self.device, index in self.tokens_innermost)
            for index, p in enumerate(like)
        ]

    def take_lent(self, like: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor] | None:
        """Takes the planes lent, once, if they are as those of `like` and large enough.

        Args:
            like: planes of the dtypes and shapes that are wanted, the dimensions of `sizes` aside.
            sizes: dimensions that may be larger, and their least size.
        """
        lent, self.lent = self.lent, []
        if len(lent) != len(like):
            return None
        free = dict(sizes)
        for index, (plane, wanted) in enumerate(zip(lent, like, strict=True)):
            if (plane.dtype, plane.device, plane.dim()) != (wanted.dtype, self.device, wanted.dim()):
                return None
            fits = (n >= free[i] if i in free else n == wanted.shape[i] for i, n in enumerate(plane.shape))
            is_innermost = index in self.tokens_innermost and plane.shape[3] > 1
            if not all(fits) or has_tokens_innermost(plane) != is_innermost:
                return None
        return lent

    def is_used_elsewhere(self) -> Callable[[], bool]:
        """Gives a function that says, once this store is gone, whether other stores hold its planes."""
        return lambda: False

    def allocate_reserved(self, needed: int, wanted: int, allocate: Callable[[int], None]) -> None:
        """Calls `allocate(wanted)`, or `allocate(needed)` where there is no memory for the reservation."""
        try:
            allocate(wanted)
        except MemoryError as error:
            if wanted <= needed:
                raise
            logger.warning("no room to reserve what max_length asks for, growing step by step instead: %s", error)
            self.reserved = 0
            allocate(needed)
