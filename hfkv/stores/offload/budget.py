"""`Offload`: the device memory and the buffers that the offloaded layers of one cache share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hfkv.stores.offload.bus import bus_to
from hfkv.stores.offload.staging import Staging


class Budget:
    """Divides device memory among layers; forks of a cache share pages, and so share one budget.

    Args:
        num_bytes: number of bytes of keys and values of all layers that may stay on devices; None where only pages that
            are being filled stay.
        bounds: the most tokens that each layer's window holds, None for a layer without a window.

    Attributes:
        asked: object that is replaced by another when shares must be found anew.
    """

    def __init__(self, num_bytes: int | None, bounds: Sequence[int | None]) -> None:
        self.num_bytes, self.bounds = num_bytes, list(bounds)
        self.asked = object()
        self._shares: dict[int, int] = {}  # bytes, of the layers that have asked
        self._least: dict[int, int] = {}  # bytes, of the layers that had asked before

    def divide_anew(self) -> None:
        """Has layers ask for their shares again, for another number of tokens; they keep at least what they have."""
        self._least |= self._shares
        self._shares = {}
        self.asked = object()

    def share(self, index: int, page_bytes: int, page_size: int, rows: int, reserved: int) -> int | None:
        """The number of pages that a layer may keep on the device; None for only those that are being filled.

        Args:
            index: index of the layer.
            page_bytes, page_size: number of bytes and of tokens of one of its pages.
            rows: number of rows, B.
            reserved: number of tokens that a row will hold in all, or 0.

        Raises:
            ValueError: there is not even one page for the layer.
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
        budget: budget of the bytes that may stay on devices.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._stagings: dict[torch.device, Staging] = {}

    def restart(self) -> None:
        """Starts anew: the cache holds nothing any more, and shares nothing with its forks."""
        self.budget = Budget(self.budget.num_bytes, self.budget.bounds)
        self._stagings = {}

    def place(self, index: int) -> Place:
        """The place of layer `index` among the offloaded layers."""
        return Place(self, index)

    def staging(self, device: torch.device) -> Staging:
        """The staging buffers on `device`."""
        if device not in self._stagings:
            self._stagings[device] = Staging(bus_to(device))
        return self._stagings[device]

    def buffer_bytes(self) -> dict[torch.device, int]:
        """Bytes of the buffers on each device."""
        return {device: staging.nbytes() for device, staging in self._stagings.items()}


class Place:
    """One layer's place among those that are offloaded.

    Attributes:
        offload: budget and buffers that the layers share.
        index: index of the layer among them.
        uncut: number of tokens at the front that were last read in one run.
    """

    def __init__(self, offload: Offload, index: int) -> None:
        self.offload, self.index, self.uncut = offload, index, 0

    @property
    def budget(self) -> Budget:
        """The budget of the bytes that may stay on devices."""
        return self.offload.budget


def _fair(pages: int, needs: Sequence[tuple[float, int]], index: int) -> int:
    """The part of `pages` for layer `index`; layers that need less than an equal part leave the rest to others."""
    left = pages
    for place, (need, layer) in enumerate(sorted(needs)):
        part = left // (len(needs) - place)
        share = int(min(need, part))
        if layer == index:
            return share
        left -= share
    return 0
