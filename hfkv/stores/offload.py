"""`Offload`: what the offloaded layers of one cache share, a budget of device memory and the buffers of each device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hfkv.stores.bus import bus_to
from hfkv.stores.staging import Staging


class Offload:
    """Divides a budget among layers and hands out the staging buffers of their devices.

    Args:
        budget: bytes of keys and values of all layers that may stay on devices; None for the pages alone that are
            being filled.
        bounds: for each layer the tokens a window holds at most, or None.
    """

    def __init__(self, budget: int | None, bounds: Sequence[int | None]) -> None:
        self.budget = budget
        self.bounds = list(bounds)
        self._shares: dict[int, int] = {}
        self.asked = object()  # another one when the shares are to be found anew
        self._stagings: dict[torch.device, Staging] = {}

    def place(self, index: int) -> Place:
        """That of layer `index` of those that `bounds` were given for."""
        return Place(self, index)

    def staging(self, device: torch.device) -> Staging:
        """The buffers on `device`."""
        if device not in self._stagings:
            self._stagings[device] = Staging(bus_to(device))
        return self._stagings[device]

    def divide_anew(self) -> None:
        """The cache is to hold another number of tokens, or none: layers ask for their share again."""
        self._shares.clear()
        self.asked = object()

    def buffer_bytes(self) -> dict[torch.device, int]:
        """Bytes of the buffers on each device."""
        return {device: staging.nbytes() for device, staging in self._stagings.items()}

    def share(self, index: int, page_bytes: int, page_size: int, rows: int, reserved: int) -> int | None:
        """See `Place.share`."""
        if self.budget is None:
            return None
        self._shares.pop(index, None)
        left = (self.budget - sum(self._shares.values())) // page_bytes
        needs = []
        for other, bound in enumerate(self.bounds):
            if other not in self._shares:
                tokens = min(reserved or math.inf, math.inf if bound is None else bound + page_size)
                needs.append((rows * math.ceil(tokens / page_size) if tokens < math.inf else math.inf, other))
        share = _fair(left, needs, index)
        if share < 1:
            least = page_bytes * len(self.bounds)
            raise ValueError(
                f"device_budget is {self.budget:,} bytes for {len(self.bounds)} layers, and one page of a layer is "
                f"{page_bytes:,} bytes ({page_size} tokens); give at least {least:,} bytes, or a smaller page_size "
                '(store="paged"), or leave device_budget out'
            )
        self._shares[index] = share * page_bytes
        return share


class Place:
    """One layer's place among them.

    Attributes:
        offload: what it shares.
        index: which of the layers it is.
        uncut: tokens at the front that were last read in one run.
    """

    def __init__(self, offload: Offload, index: int) -> None:
        self.offload, self.index, self.uncut = offload, index, 0

    def share(self, page_bytes: int, page_size: int, rows: int, reserved: int) -> int | None:
        """Pages the layer may keep on the device; None for those alone that are being filled.

        Args:
            page_bytes, page_size: bytes and tokens of one of its pages.
            rows: B.
            reserved: tokens a row will hold in all, or 0.

        Raises:
            ValueError: it is not even one.
        """
        return self.offload.share(self.index, page_bytes, page_size, rows, reserved)


def _fair(pages: int, needs: Sequence[tuple[float, int]], index: int) -> int:
    """What layer `index` gets of `pages`, where those that need less than an equal part leave the rest to others."""
    left = pages
    for place, (need, layer) in enumerate(sorted(needs)):
        part = left // (len(needs) - place)
        share = int(min(need, part))
        if layer == index:
            return share
        left -= share
    return 0
