"""`DeviceInputs`: numbers that change from one decode step to the next, in tensors that kernels read."""

from __future__ import annotations

import bisect
from array import array
from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch

from hfkv.kernels.inputs import Visibility
from hfkv.stores.layout import Layout

# The numbers at the front of `DeviceInputs.meta`; the kernels load them by these places.
SCALARS = (
    *("start", "length", "last_column", "last_slot", "seen", "first", "held_from", "num_slots", "sinks"),
    # The longest run of columns that all begin at slot 0 and end at the same one, the highest of all.
    *("full_from", "full_to"),
)
NUM_SCALARS = 16
# Behind all else, where rows differ: B of each, in this order. A row's last held token lies before `last_slot`.
ROW_NUMBERS = ("length", "last_column", "last_slot", "seen", "first")
# Programs of one split of a kernel that can be told apart.
NUM_COUNTERS = 1024
# Distinct inputs in one forward: before and after appending, in windowed and in other layers, and some to spare.
NUM_RECENT = 16


class Rows(NamedTuple):
    """Rows of different lengths in one call, as they come from an engine that serves many: each as if it were alone.

    Attributes:
        lengths: number of tokens that each row holds: of the layout's, the first ones.
        seen: each row's `Visibility.seen`.
        first: each row's `Visibility.first`; None for zeros.
    """

    lengths: tuple[int, ...]
    seen: tuple[int, ...]
    first: tuple[int, ...] | None = None


@dataclass
class DeviceInputs:
    """A `Layout` and a `Visibility` on the device.

    Kernels take nothing of the two as launch arguments, so a captured CUDA graph replays with new values
    after `update`, and a changed length never compiles a kernel again.

    Attributes:
        meta: int32 `[16 + B + 3 · columns + B · columns]`: the numbers of `SCALARS`, each row's pads, each column's low
            and high slot and the held index of its first token, and the block table. Where rows differ, int32
            `[5 · B]` of `ROW_NUMBERS` more.
        batch: number of rows, B.
        columns: number of columns of the block table that there is room for; 0 for contiguous planes.
        bounds: lower bounds of the queries, int64 `[B or 1, q]`, or None.
        mask: tokens that queries see, bool `[B or 1, 1 or Hq, q, tokens]`, or None.
        is_ragged: whether each row has a length of its own.
        shared: what equal inputs of other layers use as well: `counters`, once they are asked for.
    """

    meta: torch.Tensor
    batch: int
    columns: int
    bounds: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    is_ragged: bool = False
    shared: list[torch.Tensor] = field(default_factory=list)

    @property
    def counters(self) -> torch.Tensor:
        """Counters with which the programs of a kernel find the last of them, int32; zero between two launches."""
        if not self.shared:
            with torch.inference_mode(False):
                self.shared.append(torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=self.meta.device))
        return self.shared[0]

    @classmethod
    def allocate(
        cls,
        layout: Layout,
        visibility: Visibility | None,
        device: torch.device,
        *,
        columns: int = 0,
        tokens: int = 0,
        rows: Rows | None = None,
    ) -> DeviceInputs:
        """Allocates inputs with storages of their own, to be updated between the replays of a graph.

        Args:
            layout, visibility: first values; without a visibility the inputs are for `append` alone.
            device: device of the planes.
            columns: number of columns of the block table to make room for, if more than the layout has.
            tokens: number of tokens of a mask to make room for, if more than it has.
            rows: lengths of the rows, if they differ; then they are given at every update.
        """
        # No columns mean contiguous planes.
        columns = 0 if layout.table is None else max(columns, layout.table.shape[1], 1)
        packed = _pack(layout, visibility, columns, rows)
        inputs = cls(_empty_like(packed, device), _batch(layout, visibility), columns, is_ragged=rows is not None)
        if visibility is not None and visibility.bounds is not None:
            inputs.bounds = torch.empty(visibility.bounds.shape, dtype=torch.long, device=device)
        if visibility is not None and visibility.mask is not None:
            shape = (*visibility.mask.shape[:3], max(tokens, visibility.mask.shape[3]))
            inputs.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        inputs.update(layout, visibility, rows)
        if visibility is not None:
            # A capture would make them anew at every replay.
            _ = inputs.counters
        return inputs

    def update(self, layout: Layout, visibility: Visibility | None, rows: Rows | None = None) -> None:
        """Copies new values into the same storages, without waiting for the device.

        Raises:
            ValueError: the values do not fit what was allocated.
        """
        if layout.is_paged != (self.columns > 0):
            raise ValueError("a paged layout cannot take the place of a contiguous one, nor the other way round")
        if layout.table is not None and layout.table.shape[1] > self.columns:
            raise ValueError(f"a block table of {layout.table.shape[1]} columns, with room for {self.columns}")
        if _batch(layout, visibility) != self.batch:
            raise ValueError(f"{_batch(layout, visibility)} rows, with room for {self.batch}")
        if (rows is not None) != self.is_ragged:
            raise ValueError("the lengths of rows must be given at every step or at none")
        bounds, mask = (None, None) if visibility is None else (visibility.bounds, visibility.mask)
        for name, new, held in (("bounds", bounds, self.bounds), ("mask", mask, self.mask)):
            if (new is None) != (held is None):
                raise ValueError(f"the {name} must be given at every step or at none")
        if bounds is not None and self.bounds is not None:
            if bounds.shape != self.bounds.shape:
                raise ValueError(f"bounds {tuple(bounds.shape)}, with room for {tuple(self.bounds.shape)}")
            _copy(bounds, self.bounds)
        if mask is not None and self.mask is not None:
            if mask.shape[:3] != self.mask.shape[:3] or mask.shape[3] > self.mask.shape[3]:
                raise ValueError(f"a mask {tuple(mask.shape)}, with room for {tuple(self.mask.shape)}")
            _copy(mask, self.mask[..., : mask.shape[3]])
        _copy(_pack(layout, visibility, self.columns, rows), self.meta)


@dataclass(frozen=True)
class _Recent:
    key: tuple[object, ...]
    table: torch.Tensor | None
    inputs: DeviceInputs


_recent: deque[_Recent] = deque(maxlen=NUM_RECENT)


def device_inputs(
    layout: Layout, visibility: Visibility | None, device: torch.device, rows: Rows | None = None
) -> DeviceInputs:
    """Makes inputs for one eager call; layers that are called with equal values share one upload.

    Args:
        layout, visibility: the values; without a visibility the inputs are for `append` alone.
        device: device of the planes.
        rows: lengths of the rows, if they differ.

    Raises:
        ValueError: lengths that the layout does not have.
        RuntimeError: a CUDA graph is being captured: it would replay the values of this call for ever.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a captured graph needs inputs of its own: allocate DeviceInputs before the capture")
        stream = torch.cuda.current_stream(device).cuda_stream
    rule: tuple[object, ...] = ()
    if visibility is not None:
        rule = (visibility.seen, visibility.first, visibility.held_from, visibility.num_slots)
        rule = (*rule, visibility.sinks, visibility.pads)
    key = (device, stream, layout.length, layout.start, rule, layout.spans, rows)
    found = next(
        (recent for recent in tuple(_recent) if recent.key == key and _equal(recent.table, layout.table)), None
    )
    if found is None:
        columns = 0 if layout.table is None else layout.table.shape[1]
        packed = _pack(layout, visibility, columns, rows)
        meta = packed
        if device.type != "cpu":
            meta = _empty_like(packed, device)
            _copy(packed, meta)
        inputs = DeviceInputs(meta, _batch(layout, visibility), columns, is_ragged=rows is not None)
        found = _Recent(key, None if layout.table is None else layout.table.clone(), inputs)
        _recent.append(found)
    if visibility is None or (visibility.bounds is None and visibility.mask is None):
        return found.inputs
    held = found.inputs
    return DeviceInputs(
        held.meta, held.batch, held.columns, visibility.bounds, visibility.mask, held.is_ragged, held.shared
    )


def is_ragged(meta: torch.Tensor, batch: int, columns: int) -> bool:
    """Says whether rows have lengths of their own, of `DeviceInputs.meta` alone."""
    # Inputs that are for `append` alone, without pages, know of no rows.
    return meta.shape[0] > NUM_SCALARS + batch + (3 + batch) * columns


def _batch(layout: Layout, visibility: Visibility | None) -> int:
    """The number of rows that there are pads for."""
    if visibility is not None:
        return len(visibility.pads)
    return 0 if layout.table is None else layout.table.shape[0]


def _pack(layout: Layout, visibility: Visibility | None, columns: int, rows: Rows | None) -> torch.Tensor:
    """The numbers of `DeviceInputs.meta`, on the CPU."""
    packed = _pack_shared(layout, visibility, columns)
    return packed if rows is None else torch.cat((packed, _pack_rows(layout, _batch(layout, visibility), rows)))


def _pack_rows(layout: Layout, batch: int, rows: Rows) -> torch.Tensor:
    """The numbers of `ROW_NUMBERS`.

    Raises:
        ValueError: lengths that the layout does not have.
    """
    first = (0,) * batch if rows.first is None else rows.first
    if not len(rows.lengths) == len(rows.seen) == len(first) == batch:
        raise ValueError(f"lengths of {len(rows.lengths)} rows, with {batch} rows")
    held = sum(high - low for low, high in layout.spans) if layout.is_paged else layout.length
    if not all(0 <= length <= min(held, layout.length) for length in rows.lengths):
        raise ValueError(f"rows of {rows.lengths} tokens, in a layout of {min(held, layout.length)}")
    last_columns, last_slots = [0] * batch, [0] * batch
    for row, length in enumerate(rows.lengths):
        if layout.is_paged and length:
            column = bisect.bisect_left(layout.begins, length) - 1
            last_columns[row] = column
            last_slots[row] = layout.spans[column][0] + length - layout.begins[column]
    return torch.tensor((rows.lengths, last_columns, last_slots, rows.seen, first), dtype=torch.int32).flatten()


def _pack_shared(layout: Layout, visibility: Visibility | None, columns: int) -> torch.Tensor:
    """The numbers that all rows share, and their pads and pages."""
    batch = _batch(layout, visibility)
    last_column, last_slot = (len(layout.spans) - 1, layout.spans[-1][1]) if layout.spans else (0, 0)
    scalars = [layout.start, layout.length, last_column, last_slot, 0, 0, 0, 0, 0]
    pads: tuple[int, ...] = (0,) * batch
    if visibility is not None:
        scalars[4:] = visibility.seen, visibility.first, visibility.held_from, visibility.num_slots, visibility.sinks
        pads = visibility.pads
    numbers = array("i", (*scalars, *(0,) * (NUM_SCALARS - len(scalars)), *pads))
    if not columns:
        return torch.frombuffer(numbers, dtype=torch.int32)
    packed = torch.zeros(NUM_SCALARS + batch + 3 * columns + batch * columns, dtype=torch.int32)
    packed[: len(numbers)] = torch.frombuffer(numbers, dtype=torch.int32)
    if layout.table is not None:
        table = packed[NUM_SCALARS + batch + 3 * columns :].view(batch, columns)
        table[:, : layout.table.shape[1]] = layout.table
    if layout.spans:
        spans = packed[NUM_SCALARS + batch : NUM_SCALARS + batch + 3 * columns].view(3, columns)
        # 2,048 columns of pages of 64 tokens are 131,072 tokens: an array is ten times faster here than a list.
        slots = torch.frombuffer(array("i", chain.from_iterable(layout.spans)), dtype=torch.int32).view(-1, 2)
        held = slots[:, 1] - slots[:, 0]
        spans[:2, : len(slots)] = slots.T
        spans[2, : len(slots)] = held.cumsum(0) - held
        packed[len(scalars) : len(SCALARS)] = _longest_run(slots)
    return packed


def _longest_run(slots: torch.Tensor) -> torch.Tensor:
    """The columns `from` and `to` (behind the last) between which all slots `[columns, 2]` are `0, highest`."""
    is_full = (slots[:, 0] == 0) & (slots[:, 1] == slots[:, 1].max())
    ends = torch.nn.functional.pad((~is_full).nonzero().flatten(), (1, 1), value=-1)
    ends[-1] = len(slots)
    longest = ends.diff().argmax()
    return torch.stack((ends[longest] + 1, ends[longest + 1]))


def _empty_like(packed: torch.Tensor, device: torch.device) -> torch.Tensor:
    # A graph's inputs are written to outside inference_mode too.
    with torch.inference_mode(False):
        return torch.empty(packed.shape, dtype=packed.dtype, device=device)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies without waiting where `target` is on an accelerator.

    The allocator of pinned memory hands a block out again only when the copies out of it are done.
    """
    if source.device.type == "cpu" and target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
