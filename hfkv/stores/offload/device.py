"""`DevicePages`: pages on a device, up to a number of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hfkv.stores.base import GROWTH
from hfkv.stores.planes import allocate, has_tokens_innermost

logger = logging.getLogger("hfkv")


class DevicePages:
    """Planes `[N, H_i, P, d_i]` of N slots for pages.

    Args:
        like: planes of the same kind, `[.., H_i, P, d_i]`.
        most: the most slots; None for as many as are asked for.
    """

    def __init__(self, like: Sequence[torch.Tensor], most: int | None) -> None:
        self.most = most
        self.planes = [plane_of(0, plane) for plane in like]
        self.size = 0
        self.free: list[int] = []
        self._may_reserve = True

    @property
    def used(self) -> int:
        """The number of slots in use."""
        return self.size - len(self.free)

    def reserve(self, size: int) -> None:
        """Makes `size` slots at once, where there is memory for them."""
        if self.size < size and self._may_reserve:
            try:
                self._resize(size)
            except MemoryError as error:
                self._may_reserve = False
                logger.warning("no room to reserve a device_budget, growing step by step instead: %s", error)

    def make_room(self, count: int) -> None:
        """Makes room for `count` free slots, or for as many as `most` allows: the caller frees the others.

        Raises:
            MemoryError: there is no memory for the slots; nothing is lost.
        """
        needed = self.used + count
        if self.most is not None:
            needed = min(needed, self.most)
        if needed > self.size:
            self._resize(needed if self.most is None else min(max(needed, int(self.size * GROWTH)), self.most))

    def take(self, count: int) -> list[int]:
        """Takes `count` free slots; the caller has made room."""
        return [self.free.pop() for _ in range(count)]

    def _resize(self, size: int) -> None:
        # One by one: only one plane is there twice at any time.
        for index, old in enumerate(self.planes):
            plane = plane_of(size, old)
            plane[: self.size] = old[: self.size]
            self.planes[index] = plane
        self.free = [*range(size - 1, self.size - 1, -1), *self.free]
        self.size = size


def plane_of(size: int, like: torch.Tensor) -> torch.Tensor:
    """Allocates a plane of `size` pages that are like the pages of another."""
    return allocate((size, *like.shape[1:]), like.dtype, like.device, has_tokens_innermost(like))
