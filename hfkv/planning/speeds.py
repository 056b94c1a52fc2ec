"""`Speeds`: how fast a device reads its memory and fetches what is offloaded, and where this is known from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from hfkv.measure.timing import bus_bandwidth, copy_bandwidth
from hfkv.policy.units import read_bytes, read_number, shortened

# PCIe 5.0 with sixteen lanes carries 63 GB/s; pinned copies reach about this.
ASSUMED_BUS = 50 * 10**9
_RATE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*tb$")


@dataclass(frozen=True)
class Speeds:
    """Speeds in bytes a second, and their sources.

    Attributes:
        bandwidth: the device's memory; None where it is not on this machine and was not given.
        bandwidth_source: where that number is from.
        bus: the way between host memory and the device.
        bus_source: where that number is from.
    """

    bandwidth: int | None
    bandwidth_source: str
    bus: int
    bus_source: str

    @classmethod
    def of(cls, bandwidth: float | str | None, bus: float | str | None, device: torch.device) -> Speeds:
        """Takes the speeds given, or else measures copies on this machine's device.

        Args:
            bandwidth, bus: bytes a second, a number or such as ``"4.3TB/s"``; None is measured, which takes a second.
            device: a device of the type that is planned for.

        Raises:
            TypeError, ValueError: one is no speed.
        """
        memory = None if bandwidth is None else read_speed("bandwidth", bandwidth)
        way = None if bus is None else read_speed("bus", bus)
        here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        memory_source = way_source = "as given"
        if memory is None and device.type not in ("cpu", here.type):
            if way is None:
                way, way_source = ASSUMED_BUS, f"assumed: there is no {device.type} here to measure it"
            return cls(None, f"there is no {device.type} here to measure it; give --bandwidth", way, way_source)
        if memory is None or way is None:
            if memory is None:
                memory = round(copy_bandwidth(torch.device(device.type)))
                memory_source = f"measured by a copy on this machine's {device.type}"
            measured = bus_bandwidth(here) if way is None else None
            if measured is not None:
                way = round(measured)
                way_source = f"measured by a copy from pinned host memory to this machine's {here.type}"
            elif way is None:
                way, way_source = ASSUMED_BUS, "assumed: there is no GPU here to measure it"
        return cls(memory, memory_source, way, way_source)


def read_speed(name: str, given: float | str) -> int:
    """Reads a speed in bytes a second, at least 1.

    Args:
        name: the field's name, for the error.
        given: a number, or one with a unit: ``"4.3TB/s"``, ``"50GB/s"``.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(given, float):
        if not 1 <= given < math.inf:
            raise ValueError(f"{name} must be at least 1 byte a second, got {given}")
        given = int(given)
    if not isinstance(given, str):
        return read_bytes(name, given)
    text = given.strip().lower().removesuffix("/s")
    match = _RATE.match(text)
    try:
        return read_bytes(name, int(read_number(match[1]) * 10**12) if match else text)
    except ValueError as error:
        raise ValueError(f'{name} takes a speed such as "50GB/s" or "4.3TB/s", got {shortened(given)!r}') from error
