"""`Landing`: host memory that a device can read by itself, where experts of a file rest on their way to it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping

import torch

from hfkv.stores.offload.bus import Bus

# While one expert is on its way, the next is read from the file.
_PLACES = 2


class Landing:
    """Room for two experts, of one bus, for all layers of one shape.

    Args:
        bus: the bus they travel on.
        like: the planes of one expert.

    Attributes:
        lock: is held from `take` until what was taken has been sent.

    Raises:
        MemoryError: there is no memory for them, or it cannot be pinned.
    """

    def __init__(self, bus: Bus, like: Mapping[str, torch.Tensor]) -> None:
        self.bus = bus
        self.lock = threading.Lock()
        self._places = [
            {name: bus.allocate(plane.shape, plane.dtype) for name, plane in like.items()} for _ in range(_PLACES)
        ]
        self._next = 0

    def take(self, planes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies `planes`; a copy is good until as many more have been taken as there are places."""
        if self._next == 0:
            self.bus.settle()  # what lies here may be on its way still
        place = self._places[self._next]
        self._next = (self._next + 1) % _PLACES
        for name, plane in planes.items():
            place[name].copy_(plane)
        return place


_landings: weakref.WeakValueDictionary[tuple[object, ...], Landing] = weakref.WeakValueDictionary()


def landing_for(bus: Bus, like: Mapping[str, torch.Tensor]) -> Landing:
    """The landing of a bus for experts of that shape."""
    shapes = ((name, tuple(plane.shape), plane.dtype) for name, plane in like.items())
    key = (id(bus), *shapes)
    landing = _landings.get(key)
    if landing is None or landing.bus is not bus:
        _landings[key] = landing = Landing(bus, like)
    return landing
