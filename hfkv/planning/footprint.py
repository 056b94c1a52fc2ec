"""`Footprint`: the bytes a cache of one config takes, at any length and batch, without filling it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch

from hfkv.cache.kv_cache import KVCache
from hfkv.cache.layers.base import CacheLayer
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.layers.span import Span
from hfkv.planning.geometry import Geometry, States
from hfkv.policy.config import KVConfig
from hfkv.stores import ContiguousStore, PagedStore, Store, make_store
from hfkv.stores.offload.bus import BUSES
from hfkv.stores.offload.staging import BUFFER_BYTES, BUFFERS
from hfkv.stores.planes import token_bytes

# Tokens of a prompt that are read at a time: generate(prefill_chunk_size=2048). What a forward brings is held until the
# next one, windows or not, and its activations grow with it.
PREFILL_CHUNK = 2048
# The buffers through which offloaded tokens come to the device.
STAGING = BUFFERS * BUFFER_BYTES
# Steps of one token that are followed one by one: after so many, what a window has room for changes no more.
MOST_STEPS = 4096
# So many lengths of a prompt's last chunk, up to that of the window, are tried.
LAST_CHUNKS = 32
# Rows that are followed together where a window drops pages: how many pages stay spare is rounded over all rows.
ROWS_TOGETHER = 8


class FootprintBytes(NamedTuple):
    """The bytes that rows take.

    Attributes:
        allocated: bytes allocated while the cache decodes.
        peak: the most bytes while the prompt is read, `PREFILL_CHUNK` tokens at a time.
        held: the bytes of the tokens, without spare room: what a step reads.
    """

    allocated: int
    peak: int
    held: int

    def times(self, factor: int, divisor: int = 1) -> FootprintBytes:
        """The product, field by field, rounded down."""
        return FootprintBytes(*(count * factor // divisor for count in self))

    def plus(self, other: FootprintBytes) -> FootprintBytes:
        """The sum, field by field."""
        return FootprintBytes(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class _Kind:
    """A kind of layers that take the same bytes: a `KVLayer`'s policies and what it is given."""

    kv: KVConfig
    sliding: int | None
    states: States


class Footprint:
    """The bytes of a cache, as its own stores allocate them for planes without contents.

    A batch is its rows' sum. Beams count as rows; the pages they share do not show.

    Args:
        geometry: the model's geometry.
        kv: the cache's config.
        device: the device where attention computes: pages differ by its type. It need not exist here.
        reply: how many of the tokens come one by one; the others are prompt. Spare room behind a window depends on it:
            None is the most there can be, whatever the reply.

    Raises:
        ValueError: `kv` does not fit the model's layers, or its `device_budget` is less than a page of each.
    """

    def __init__(self, geometry: Geometry, kv: KVConfig, device: torch.device, reply: int | None = None) -> None:
        self.geometry, self.kv, self.device, self.reply = geometry, kv, device, reply
        kv = replace(kv, reuse=None)
        config = geometry.config
        # How keys are rotated changes no byte, and finding it out would take weights.
        rotary = dict.fromkeys(range(len(KVCache(config).layers))) if kv.needs_rotary else None
        self._kinds = Counter(
            kind
            for index, layer in enumerate(KVCache(config, kv, rotary).layers)
            if index in geometry.states
            for kind in _kinds(layer, geometry.states[index])
        )
        self._known: dict[tuple[int, int], tuple[FootprintBytes, FootprintBytes]] = {}
        self._spare: dict[tuple[_Kind, int, int], int] = {}
        self._check_budget()

    def of(self, tokens: int, batch: int = 1) -> FootprintBytes:
        """The bytes that `batch` rows of `tokens` take, on all devices together.

        Args:
            tokens: tokens held in all, at least 1; known beforehand, as a patched `generate` knows them.
            batch: rows.
        """
        resident, offloaded = self._parts(tokens, batch)
        return resident.plus(offloaded)

    def offloaded(self, tokens: int, batch: int = 1) -> FootprintBytes:
        """The bytes kept in host memory; on a CPU none."""
        return self._parts(tokens, batch)[1]

    def on_device(self, tokens: int, batch: int = 1) -> int:
        """The most bytes on the device where attention computes.

        Offloaded tokens leave there what `device_budget` says, or the newest page of each row, and the staging buffers.
        """
        resident, offloaded = self._parts(tokens, batch)
        if not offloaded.peak:
            return resident.peak
        if self.kv.device_budget is not None:
            kept = int(self.kv.device_budget)
        else:
            newest = (self._page_bytes(kind) * count for kind, count in self._kinds.items() if self._is_away(kind))
            kept = sum(newest) * batch
        return resident.peak + min(offloaded.peak, kept + STAGING)

    def _parts(self, tokens: int, batch: int) -> tuple[FootprintBytes, FootprintBytes]:
        """The bytes that stay on the device by themselves, and those that are offloaded."""
        stores = [self._store_of(kind) for kind in self._kinds]
        rounds = any(store.is_paged and store.bound is not None for store in stores)
        rows = min(batch, ROWS_TOGETHER) if rounds else 1
        if (tokens, rows) not in self._known:
            own = rows * (self.geometry.own_row_bytes + tokens * self.geometry.own_token_bytes)
            resident, offloaded = FootprintBytes(own, own, own), FootprintBytes(0, 0, 0)
            for kind, count in self._kinds.items():
                filled = self._fill(kind, tokens, rows).times(count)
                resident = resident.plus(_index(kind.states, tokens, rows).times(count))
                if self._is_away(kind):
                    offloaded = offloaded.plus(filled)
                else:
                    resident = resident.plus(filled)
            self._known[tokens, rows] = resident, offloaded
        resident, offloaded = self._known[tokens, rows]
        return resident.times(batch, rows), offloaded.times(batch, rows)

    @property
    def is_offloaded(self) -> bool:
        """Whether some bytes are kept in a memory that is not the device's."""
        return any(self._is_away(kind) for kind in self._kinds)

    @property
    def least_budget(self) -> int:
        """The smallest `device_budget`: a page of every offloaded layer; 0 where nothing is offloaded."""
        away = {kind: count for kind, count in self._kinds.items() if self._is_away(kind)}
        return max(map(self._page_bytes, away), default=0) * sum(away.values())

    def _check_budget(self) -> None:
        """Refuses what `stores.Offload` would refuse at the first key."""
        if self.kv.device_budget is not None and int(self.kv.device_budget) < self.least_budget:
            away = sum(count for kind, count in self._kinds.items() if self._is_away(kind))
            raise ValueError(
                f"device_budget is {self.kv.device_budget:,} bytes, less than a page of each of {away} layers; give "
                f"at least {self.least_budget:,} bytes, or a smaller page_size (paged+page_size:16), or leave it out"
            )

    def _is_away(self, kind: _Kind) -> bool:
        return kind.kv.offload and self.device.type in BUSES

    def _store_of(self, kind: _Kind) -> Store:
        """A store as such layers have; offloaded tokens lie in pages, which take the same wherever they are."""
        kind_of_store = "paged" if self._is_away(kind) else kind.kv.store
        return make_store(kind_of_store, self.device, kind.kv.page_size, bound=KVLayer(kind.kv, kind.sliding).bound)

    def _page_bytes(self, kind: _Kind) -> int:
        """The bytes of a row's page, which is on the device while it is filled."""
        store = self._store_of(kind)
        return cast("PagedStore", store).page_size * sum(token_bytes(plane) for plane in _planes(kind, 1, 1))

    def _fill(self, kind: _Kind, tokens: int, rows: int) -> FootprintBytes:
        """The bytes that one layer's store takes, filled step by step as `KVLayer` does."""
        window = KVLayer(kind.kv, kind.sliding).window
        if not window:
            return self._follow(kind, tokens, rows, (tokens,))
        filled = self._follow(kind, tokens, rows, _chunks(tokens, self.reply or 1))
        if self.reply is not None:
            return filled
        allocated = max(filled.allocated, self._most_spare(kind, tokens, rows))
        return filled._replace(allocated=allocated, peak=max(filled.peak, allocated))

    def _most_spare(self, kind: _Kind, tokens: int, rows: int) -> int:
        """The most bytes allocated after some prompt and a few tokens one by one.

        A buffer that a prompt's last chunk has made is kept while it is not much larger than the window needs: the
        largest that is kept is looked for among all such chunks.
        """
        bound = self._store_of(kind).bound or 0
        # What came before that is gone.
        full = bound // PREFILL_CHUNK + 2
        tokens = min(tokens, (full + 1) * PREFILL_CHUNK)
        if (kind, tokens, rows) not in self._spare:

            def after(last: int) -> int:
                before = min((tokens - last - 2) // PREFILL_CHUNK, full)
                chunks = (*[PREFILL_CHUNK] * before, last, 1, 1)
                return self._follow(kind, tokens, rows, chunks).allocated

            longest, stride = min(PREFILL_CHUNK, tokens - 2, 2 * bound), max(bound // LAST_CHUNKS, 1)
            lasts = [*range(1, longest, stride), longest] if longest > 0 else []
            most, best = max(((after(last), last) for last in lasts), default=(0, 0))
            low, high = best, min(best + stride, longest + 1)
            while high - low > 1:
                middle = (low + high) // 2
                found = after(middle)
                most, low, high = (found, middle, high) if found >= most else (most, low, middle)
            self._spare[kind, tokens, rows] = most
        return self._spare[kind, tokens, rows]

    def _follow(self, kind: _Kind, tokens: int, rows: int, chunks: Sequence[int]) -> FootprintBytes:
        """The bytes that one layer's store for `tokens` takes after some forwards."""
        window, store = KVLayer(kind.kv, kind.sliding).window, self._store_of(kind)
        slots = window.num_slots if window else 0
        span = Span(window)
        store.reserve(tokens + slots)
        store.append(_planes(kind, rows, slots))
        peak = 0
        for count in chunks:
            gone_below = span.next_gone_below(rows)
            if gone_below != span.gone_below:
                dropped = span.forget_below(gone_below)
                store.drop(slots, slots + dropped)
            store.extend(count)
            span.advance(count)
            peak = max(peak, sum(plane.nbytes for plane in store.planes))
        return FootprintBytes(sum(plane.nbytes for plane in store.planes), peak, store.held_bytes())


def _kinds(layer: CacheLayer, states: States) -> list[_Kind]:
    counts = zip(layer.count_heads(states.key_heads), layer.count_heads(states.value_heads), strict=True)
    return [
        _Kind(replace(leaf.kv, device_budget=None), leaf.sliding, states._replace(key_heads=keys, value_heads=values))
        for leaf, (keys, values) in zip(layer.leaves, counts, strict=True)
    ]


def _index(states: States, tokens: int, rows: int) -> FootprintBytes:
    """The bytes of the keys of a layer's indexer, which stay on the device as they are; see `IndexedLayer`."""
    if not states.index_dim:
        return FootprintBytes(0, 0, 0)
    store = ContiguousStore()
    store.reserve(tokens)
    store.append((torch.empty(rows, 1, tokens, states.index_dim, dtype=states.index_dtype, device="meta"),))
    return FootprintBytes(*(sum(plane.nbytes for plane in store.planes),) * 2, store.held_bytes())


def _chunks(tokens: int, reply: int) -> list[int]:
    """The lengths of forwards: a prompt in chunks, and behind it tokens one by one."""
    steps = min(reply, MOST_STEPS, tokens - 1)
    full, rest = divmod(tokens - steps, PREFILL_CHUNK)
    return [*[PREFILL_CHUNK] * full, *([rest] if rest else []), *[1] * steps]


def _planes(kind: _Kind, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """The planes the layer's codec writes, `[B, H, T, d]`, without contents."""
    codecs, states = KVLayer(kind.kv).codecs, kind.states
    keys = torch.empty(rows, states.key_heads, tokens, states.key_dim, dtype=states.dtype, device="meta")
    values = torch.empty(rows, states.value_heads, tokens, states.value_dim, dtype=states.dtype, device="meta")
    return codecs.encode(keys, values)
