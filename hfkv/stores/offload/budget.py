"""`Offload`: what the offloaded layers of one cache share, a budget of device memory and the buffers of each device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hfkv.stores.offload.bus import bus_to
from hfkv.stores.offload.staging import Staging


class Budget:
    """Divides device memory among layers. Forks of a cache share pages, and so one of these.

    Args:
        num_bytes: of keys and values of all layers that may stay on devices; None for the pages alone that are being
            filled.
        bounds: for each layer the tokens a window holds at most, or None.

    Attributes:
        asked: another object when the shares are to be found anew.
    """

    def __init__(self, num_bytes: int | None, bounds: Sequence[int | None]) -> None:
        self.num_bytes, self.bounds = num_bytes, list(bounds)
        self.asked = object()
        self._shares: dict[int, int] = {}  # bytes, of the layers that have asked
        self._least: dict[int, int] = {}  # of those that had asked before

    def divide_anew(self) -> None:
        """Another number of tokens is to be held: layers ask again, and keep at least what they have."""
        self._least |= self._shares
        self._shares = {}
        self.asked = object()

    def share(self, index: int, page_bytes: int, page_size: int, rows: int, reserved: int) -> int | None:
        """Pages that a layer may keep on the device; None for those alone that are being filled.

        Args:
            index: which of the layers.
            page_bytes, page_size: bytes and tokens of one of its pages.
            rows: B.
            reserved: tokens a row will hold in all, or 0.

        Raises:
            ValueError: it is not even one.
        """
        if self.num_bytes is None:
            return None
        taken = {**self._least, **self._shares}
        left = (self.num_bytes - sum(taken.values())) // page_bytes
        needs: list[tuple[float, int]] = []
        for other, bound in enumerate(self.bounds):
            if other == index or other not in self._shares:
                tokens = min(reserved or math.inf, math.inf if bound is None else bound + page_size)
                pages = rows * math.ceil(tokens / page_size) if tokens < math.inf else math.inf
                needs.append((max(pages - taken.get(other, 0) // page_bytes, 0), other))
        share = taken.get(index, 0) // page_bytes + _fair(max(left, 0), needs, index)
        if share < 1:
            least = page_bytes * len(self.bounds)
            raise ValueError(
                f"device_budget is {self.num_bytes:,} bytes for {len(self.bounds)} layers, and one page of a layer is "
                f"{page_bytes:,} bytes ({page_size} tokens); give at least {least:,} bytes, or a smaller page_size "
                '(store="paged"), or leave device_budget out'
            )
        self._shares[index] = max(share * page_bytes, taken.get(index, 0))
        return share


class Offload:
    """Hands out a budget and the staging buffers of each device.

    Args:
        budget: what may stay on devices.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._stagings: dict[torch.device, Staging] = {}

    def restart(self) -> None:
        """The cache holds nothing any more, and shares nothing with its forks."""
        self.budget = Budget(self.budget.num_bytes, self.budget.bounds)
        self._stagings = {}

    def place(self, index: int) -> Place:
        """That of layer `index` of those that are offloaded."""
        return Place(self, index)

    def staging(self, device: torch.device) -> Staging:
        """The buffers on `device`."""
        if device not in self._stagings:
            self._stagings[device] = Staging(bus_to(device))
        return self._stagings[device]

    def buffer_bytes(self) -> dict[torch.device, int]:
        """Bytes of the buffers on each device."""
        return {device: staging.nbytes() for device, staging in self._stagings.items()}


class Place:
    """One layer's place among those that are offloaded.

    Attributes:
        offload: what it shares.
        index: which of the layers it is.
        uncut: tokens at the front that were last read in one run.
    """

    def __init__(self, offload: Offload, index: int) -> None:
        self.offload, self.index, self.uncut = offload, index, 0

    @property
    def budget(self) -> Budget:
        """What may stay on devices."""
        return self.offload.budget


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
