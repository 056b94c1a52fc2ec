"""`PrefixPool`: pages of prompts that calls have seen, found again by their tokens."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hfkv.cache.layers.contents import Contents
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.snapshot import Part, PartShape
from hfkv.stores.blocks import BlockPool
from hfkv.stores.layout import Layout, bits_of

logger = logging.getLogger("hfkv")

# The pool's planes grow by this part of what they hold until its budget is reached: a later question needs no new ones.
SLACK = 3


@dataclass(frozen=True)
class ReuseStats:
    """What the calls of a patched model have shared.

    Attributes:
        lookups: prompts (rows) that were looked up.
        hits: prompts of which some page was there.
        tokens: tokens of all prompts looked up, without padding.
        tokens_reused: tokens that were not computed again.
        pages, page_size: pages kept, and tokens a page.
        nbytes, budget: bytes of the pages kept, and the most that may be.
        evictions: pages that had to go.
    """

    lookups: int
    hits: int
    tokens: int
    tokens_reused: int
    pages: int
    page_size: int
    nbytes: int
    budget: int
    evictions: int

    def __str__(self) -> str:
        return (
            f"{self.hits:,} of {self.lookups:,} prompts began like an earlier one; {self.tokens_reused:,} of "
            f"{self.tokens:,} tokens were not read again; {self.pages:,} pages of {self.page_size} tokens kept, "
            f"{self.nbytes:,} of at most {self.budget:,} bytes; {self.evictions:,} pages had to go"
        )


def page_keys(root: bytes, ids: torch.Tensor, page_size: int) -> list[bytes]:
    """The key of every whole page of a text: a hash of its tokens and of all that is before them.

    Args:
        root: a hash of what keys and values depend on besides tokens.
        ids: int64 `[T]`, on the CPU.
        page_size: tokens a page.
    """
    keys, key = [], root
    whole = ids[: len(ids) - len(ids) % page_size].contiguous().numpy()
    for first in range(0, len(whole), page_size):
        key = hashlib.blake2b(key + whole[first : first + page_size].tobytes(), digest_size=32).digest()
        keys.append(key)
    return keys


class PrefixPool:
    """Copies of pages of all layers, shared by the calls of one patched model and their threads.

    A page is found by its tokens and everything before them. What a call takes from here is copied into its own cache,
    so no call ever writes to a page of the pool. When the budget is reached, the pages used least recently go, the last
    of a text before those it continues.

    Args:
        budget: the most bytes to keep.
        page_size: tokens a page.
    """

    def __init__(self, budget: int, page_size: int) -> None:
        self.budget, self.page_size = budget, page_size
        self.blocks = BlockPool()
        self._lock = threading.RLock()
        self._index: OrderedDict[bytes, int] = OrderedDict()  # key -> page, the least recently used first
        self._planes: list[list[torch.Tensor]] = []  # of each layer: [N, H_i, P, d_i]
        self._layers: list[tuple[int, dict[Part, PartShape], torch.device]] = []  # those that are filled
        self._page_bytes = 0
        self._capacity: int | None = None  # in pages, where memory has run out before the budget
        self._lookups = self._hits = self._tokens = self._reused = self._evictions = 0
        self._warned = False

    def stats(self) -> ReuseStats:
        """What has been shared so far."""
        with self._lock:
            pages = len(self._index)
            return ReuseStats(
                self._lookups,
                self._hits,
                self._tokens,
                self._reused,
                pages,
                self.page_size,
                pages * self._page_bytes,
                self.budget,
                self._evictions,
            )

    def clear(self) -> None:
        """Forgets every page; running calls keep what they have."""
        with self._lock:
            self.blocks.release(self._index.values())
            self._index.clear()
            if not self.blocks.used:
                self.blocks, self._planes, self._layers, self._page_bytes = BlockPool(), [], [], 0

    def count(self, tokens: int, reused: int) -> None:
        """Notes that a prompt of `tokens` was looked up and `reused` of them were taken from here."""
        with self._lock:
            self._lookups += 1
            self._hits += reused > 0
            self._tokens += tokens
            self._reused += reused

    @contextmanager
    def found(self, keys: Sequence[Sequence[bytes]]) -> Iterator[list[list[int]]]:
        """The pages of the longest known beginnings of several texts; they stay while the context lasts."""
        held: list[list[int]] = []
        with self._lock:
            for row in keys:
                pages = [self._index[key] for key in self._touched(row)]
                self.blocks.retain(pages)
                held.append(pages)
        try:
            yield held
        finally:
            with self._lock:
                for pages in held:
                    self.blocks.release(pages)

    def _touched(self, keys: Sequence[bytes]) -> list[bytes]:
        """The keys of a text that are here, from the first on; the most recently used now, the first of all."""
        known = list(itertools.takewhile(self._index.__contains__, keys))
        for key in reversed(known):
            self._index.move_to_end(key)
        return known

    def missing(self, keys: Sequence[bytes]) -> set[bytes]:
        """The keys among `keys` that are not here."""
        with self._lock:
            return {key for key in keys if key not in self._index}

    def give(self, layers: Sequence[KVLayer], rows: Sequence[Sequence[int]], pads: Sequence[int], columns: int) -> None:
        """Puts pages into the empty layers of a cache, as its first `columns` tokens.

        Args:
            layers: all layers of the cache.
            rows: the pages of each row's text, from `found`.
            pads: pad tokens of each row; behind them come its pages, as far as there are columns.
            columns: tokens to hold, pad tokens included.
        """
        same = len(rows) > 1 and not any(pads) and all(list(row) == list(rows[0]) for row in rows)
        tables = [torch.tensor([list(row)], dtype=torch.long) for row in (rows[:1] if same else rows)]
        with self._lock:
            planes, shapes = [list(of_layer) for of_layer in self._planes], self._layers
        for of_layer, (index, parts, device) in zip(planes, shapes, strict=True):
            layer = layers[index]
            shown = tuple(min(pad, columns) for pad in pads[: len(tables)])
            texts = [self._text(of_layer, table, columns - pad) for table, pad in zip(tables, shown, strict=True)]
            tokens = texts[0] if len(texts) == 1 and not shown[0] else _stacked(texts, of_layer, columns)
            layer.adopt(Contents(parts, device, None, tokens, columns, 0, shown, tuple(pads[: len(tables)])))
            if same:
                layer.batch_repeat_interleave(len(rows))

    def _text(self, planes: list[torch.Tensor], table: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        spans = ((0, self.page_size),) * table.shape[1]
        return Layout(table.shape[1] * self.page_size, table=table, spans=spans).read(planes, 0, count)

    def take(self, layers: Sequence[KVLayer], keys: Sequence[Sequence[bytes]], pads: Sequence[int]) -> None:
        """Keeps the pages of a cache's texts that are not here yet.

        Args:
            layers: all layers of the cache; a stage of a pipeline fills its own only.
            keys: the keys of the whole pages of each row's text.
            pads: pad tokens of each row.
        """
        # What a window has dropped is no longer there to be kept.
        first_held = max(layer.span.held_from for layer in layers)
        filled = [(index, layer) for index, layer in enumerate(layers) if layer.is_initialized]
        with self._lock:
            for row, (of_row, pad) in enumerate(zip(keys, pads, strict=True)):
                if not self._learn(filled):
                    return
                known = len(self._touched(of_row))
                if known == len(of_row) or pad + known * self.page_size < first_held:
                    continue
                pages = self._room(of_row, len(of_row) - known)
                if not pages:
                    continue
                first = pad + known * self.page_size
                for (_, layer), planes in zip(filled, self._planes, strict=True):
                    begin = layer.held_index(first)
                    end = begin + len(pages) * self.page_size
                    held = layer.store.read(slice(None), begin, end, slice(row, row + 1))
                    for plane, tokens in zip(planes, held, strict=True):
                        whole = tokens[0].unflatten(1, (len(pages), self.page_size)).transpose(0, 1)
                        bits_of(plane)[pages] = bits_of(whole).to(plane.device)
                self._index |= zip(of_row[known:], pages, strict=False)  # not all may have found room
                self._touched(of_row)

    def _learn(self, layers: Sequence[tuple[int, KVLayer]]) -> bool:
        """Makes empty planes like those of a cache, where there are none; whether its pages fit in."""
        shapes = [(index, layer.parts, layer.device) for index, layer in layers]
        if self._layers and self._layers != shapes:
            self.clear()  # the model has been cast or moved: nothing here can be found again
        if self._layers:
            return self._layers == shapes
        self._layers = shapes
        for _, layer in layers:
            with torch.inference_mode(False):
                self._planes.append(
                    [
                        plane.new_empty(0, plane.shape[1], self.page_size, plane.shape[3], device=layer.store.home)
                        for plane in layer.store.planes
                    ]
                )
        self._page_bytes = sum(
            plane.shape[1] * plane.shape[2] * plane.shape[3] * plane.element_size()
            for of_layer in self._planes
            for plane in of_layer
        )
        return True

    def _room(self, keys: Sequence[bytes], count: int) -> list[int]:
        """Frees up to `count` pages, for pages that continue the known ones among `keys`: those stay."""
        most = self.budget // self._page_bytes
        if self._capacity is not None:
            most = min(most, self._capacity)
        own = set(keys)
        needed = self.blocks.used + count
        while needed > most and self._index and next(iter(self._index)) not in own:
            _, page = self._index.popitem(last=False)
            self.blocks.release([page])
            self._evictions += 1
            needed = self.blocks.used + count
        if needed > most and not self._warned:
            self._warned = True
            kept = "only its beginning is kept" if most else f"not one page of {self.page_size} tokens is kept"
            logger.warning(
                "the reuse budget of %s bytes is too small for a prompt: it needs %s; %s",
                f"{self.budget:,}",
                f"{needed * self._page_bytes:,}",
                kept,
            )
        needed = min(needed, most)
        if needed > self.blocks.size:
            self._grow(min(needed + needed // SLACK, most))
        return self.blocks.take(max(min(count, self.blocks.size - self.blocks.used), 0))

    def _grow(self, size: int) -> None:
        try:
            for of_layer in self._planes:
                for index, old in enumerate(of_layer):
                    with torch.inference_mode(False):
                        grown = torch.empty(size, *old.shape[1:], dtype=old.dtype, device=old.device)
                    grown[: len(old)] = old
                    of_layer[index] = grown
        except RuntimeError as error:
            logger.warning("no memory to keep more prompt prefixes: %s", str(error).splitlines()[0])
            self._capacity = self.blocks.size
            return
        self.blocks.grow(size)


def _stacked(
    texts: Sequence[tuple[torch.Tensor, ...]], planes: Sequence[torch.Tensor], columns: int
) -> tuple[torch.Tensor, ...]:
    """Stacks rows of different lengths, `[1, H_i, T_b, d_i]` each, with padding on the left."""
    stacked = []
    for index, plane in enumerate(planes):
        rows = plane.new_zeros(len(texts), plane.shape[1], columns, plane.shape[3])
        for row, text in zip(rows, texts, strict=True):
            count = text[index].shape[2]
            bits_of(row)[:, columns - count :] = bits_of(text[index][0])
        stacked.append(rows)
    return tuple(stacked)
