"""`CacheMemory`: the bytes of a cache by layer, plane and device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.measure.allocated import own_tensors
from hfkv.policy.ports import port

if TYPE_CHECKING:
    from rich.table import Table
else:
    Table = Any  # for typing.get_type_hints, without the import


class Bytes(NamedTuple):
    """Bytes allocated, and the part of them that holds tokens."""

    allocated: int
    held: int


@dataclass(frozen=True)
class PlaneMemory:
    """The bytes that one plane of one layer takes on one device.

    Attributes:
        layer: index of the layer; None for what all layers share.
        part: ``"key"`` or ``"value"``; ``"state"`` for what is neither.
        plane: name of the plane: ``"states"`` for plain tensors, ``"codes"``, ``"scale"``, ...; for transformers' own
            layers, name of the attribute.
        device: device of the plane.
        allocated_bytes: bytes of the plane's storage; 0 where a row before has counted the same storage.
        held_bytes: bytes of these that hold tokens, shared ones counted once.
        heads: kv heads of the plane; empty for all of them.
    """

    layer: int | None
    part: str
    plane: str
    device: torch.device
    allocated_bytes: int
    held_bytes: int
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheMemory:
    """The memory of a cache at one moment; printed, it is a table in which layers that are alike share a line.

    Attributes:
        rows: one row for each plane. Their sums are the cache's `nbytes()` and `held_bytes()`.
    """

    rows: tuple[PlaneMemory, ...]

    @classmethod
    def of(cls, layers: Iterable[Any], shared: Iterable[PlaneMemory] = ()) -> CacheMemory:
        """Measures the layers of a cache.

        Args:
            layers: layers of hfkv, and transformers' own.
            shared: rows for what the cache has besides its layers.
        """
        seen: set[int] = set()
        rows = (row for index, layer in enumerate(layers) for row in _rows(index, layer, seen))
        return cls((*rows, *shared))

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated: the cache's `nbytes()`."""
        return self.total().allocated

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens held: the cache's `held_bytes()`."""
        return self.total().held

    def total(self) -> Bytes:
        """The sum of all rows."""
        return _sum(self.rows)

    def by_device(self) -> dict[str, Bytes]:
        """Sums by the device's name: ``"cpu"``, ``"cuda:0"``."""
        return self._by(lambda row: str(row.device))

    def by_layer(self) -> dict[int | None, Bytes]:
        """Sums by the layer's index; None is the key of what the layers share, where there is such."""
        return self._by(lambda row: row.layer)

    def by_plane(self) -> dict[tuple[str, str], Bytes]:
        """Sums by part and plane: ``("key", "codes")``."""
        return self._by(lambda row: (row.part, row.plane))

    def _by(self, key: Any) -> dict[Any, Bytes]:
        groups: dict[Any, list[PlaneMemory]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return {name: _sum(rows) for name, rows in groups.items()}

    def table(self) -> Table:
        """A rich table: a line for each plane of each run of layers that are alike, and the sum of every device."""
        return port("cache_memory_table")(self)

    def merged(self) -> Iterator[tuple[str, PlaneMemory]]:
        """Yields rows of neighbouring layers that are alike as one row, with the layers' names and the sum of bytes."""
        by_layer = [(layer, list(rows)) for layer, rows in itertools.groupby(self.rows, lambda row: row.layer)]
        for _, alike in itertools.groupby(by_layer, _kind):
            layers = list(alike)
            first, last = layers[0][0], layers[-1][0]
            name = "shared" if last is None else str(first) if first == last else f"{first}-{last}"
            for rows in zip(*(rows for _, rows in layers), strict=True):
                allocated, held = _sum(rows)
                yield name, replace(rows[0], allocated_bytes=allocated, held_bytes=held)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return port("plain_text")(self.table())


def _kind(layer: tuple[int | None, list[PlaneMemory]]) -> Any:
    """The key that is the same for layers that share a line."""
    index, rows = layer
    return index is None, [replace(row, layer=None) for row in rows]


def _sum(rows: Iterable[PlaneMemory]) -> Bytes:
    sizes = [(row.allocated_bytes, row.held_bytes) for row in rows]
    return Bytes(sum(size[0] for size in sizes), sum(size[1] for size in sizes))


def _rows(index: int, layer: Any, seen: set[int]) -> Iterator[PlaneMemory]:
    if not isinstance(layer, CacheLayer):
        yield from _of_own(index, layer, seen)
        return
    for heads, leaf in zip(layer.leaf_heads, layer.leaves, strict=True):
        yield from _of_leaf(index, leaf, heads)
    for _, device, allocated, held in layer.extra_memory():
        yield PlaneMemory(index, "state", layer.extra_name, device, allocated, held)


def _of_leaf(index: int, layer: KVLayer, heads: tuple[int, ...]) -> Iterator[PlaneMemory]:
    if not layer.is_initialized:
        return
    planes = [(part, name) for part in ("key", "value") for name in layer.codecs.of(part).plane_names]
    for plane, device, allocated, held in layer.store.memory():
        if allocated:  # an offloaded plane may have nothing on one of its two devices
            yield PlaneMemory(index, *planes[plane], device, allocated, held, heads)


def _of_own(index: int, layer: Any, seen: set[int]) -> Iterator[PlaneMemory]:
    parts = {"keys": "key", "values": "value"}
    for name, tensor in own_tensors(layer):
        storage = tensor.untyped_storage()
        size = 0 if storage._cdata in seen else storage.nbytes()
        seen.add(storage._cdata)
        yield PlaneMemory(index, parts.get(name, "state"), name, tensor.device, size, size)
