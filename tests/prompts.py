"""A `PrefixPool`, and beside it what it must find."""

from __future__ import annotations

import functools
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from hfkv import KVCache
from hfkv.codecs import Codecs
from hfkv.sharing.prefix_pool import PrefixPool, page_keys
from tests.twins import HEAD_DIM, HEADS, LAYERS, config

ROOTS = (b"one model", b"another")
Text = tuple[int, ...]


@functools.lru_cache(100_000)
def content(root: bytes, prefix: Text) -> torch.Tensor:
    """The keys and values `[LAYERS, 2, H, D]` of the last token of `prefix`."""
    digest = hashlib.blake2b(root + bytes(prefix), digest_size=LAYERS * 2 * HEADS * HEAD_DIM).digest()
    return torch.tensor(list(digest), dtype=torch.float32).view(LAYERS, 2, HEADS, HEAD_DIM)


def contents(root: bytes, text: Text, first: int = 0) -> torch.Tensor:
    """`[LAYERS, 2, H, T, D]` of the tokens from `first` on."""
    tokens = [content(root, text[: end + 1]) for end in range(first, len(text))]
    return torch.stack(tokens, dim=3) if tokens else torch.zeros(LAYERS, 2, HEADS, 0, HEAD_DIM)


@dataclass
class Prompts:
    """Texts of one call, all ending in the same column, and their padding on the left."""

    root: bytes
    texts: list[Text]
    page_size: int
    pads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pads = self.pads or [max(map(len, self.texts)) - len(text) for text in self.texts]

    @property
    def length(self) -> int:
        return self.pads[0] + len(self.texts[0])

    def keys(self) -> list[list[bytes]]:
        return [page_keys(self.root, torch.tensor(text, dtype=torch.long), self.page_size) for text in self.texts]

    def pages(self) -> list[list[tuple[bytes, Text]]]:
        """What the keys stand for."""
        ends = [range(self.page_size, len(text) + 1, self.page_size) for text in self.texts]
        return [[(self.root, text[:end]) for end in of_row] for text, of_row in zip(self.texts, ends, strict=True)]

    def until(self, end: int) -> Prompts:
        """The first `end` columns of them."""
        return Prompts(
            self.root,
            [text[: max(end - pad, 0)] for text, pad in zip(self.texts, self.pads, strict=True)],
            self.page_size,
            [min(pad, end) for pad in self.pads],
        )

    def feed(self, cache: KVCache, first: int) -> None:
        """Appends the columns from `first` on, padding too."""
        rows = []
        for text, pad in zip(self.texts, self.pads, strict=True):
            padding = torch.full((LAYERS, 2, HEADS, max(pad - first, 0), HEAD_DIM), 7.0)
            rows.append(torch.cat((padding, contents(self.root, text, max(first - pad, 0))), dim=3))
        states = torch.stack(rows, dim=2)  # [LAYERS, 2, B, H, T, D]
        for layer_idx, (keys, values) in enumerate(states):
            cache.update(keys, values, layer_idx)

    def check(self, cache: KVCache, columns: int) -> None:
        """Whether the first `columns` columns are what was computed, padding apart."""
        assert cache.get_seq_length() == columns
        codecs = Codecs.named(cache.kv.codec)
        for row, (text, pad) in enumerate(zip(self.texts, self.pads, strict=True)):
            expected = contents(self.root, text[: max(columns - pad, 0)])
            for layer, wanted in zip(cache.layers, expected, strict=True):
                sides = (codecs.key, layer.keys), (codecs.value, layer.values)
                for (codec, held), plane in zip(sides, wanted, strict=True):
                    decoded = codec.decode(codec.encode(plane[None]), HEAD_DIM, plane.dtype)
                    assert held.shape[:3] == (len(self.texts), HEADS, columns)
                    assert torch.equal(held[row, :, min(pad, columns) :], decoded[0])


def page_bytes(codec: str, page_size: int) -> int:
    token = HEAD_DIM + 2 if codec == "int8" else 4 * HEAD_DIM
    return LAYERS * 2 * HEADS * page_size * token


class Page:
    """A page that the pool should have."""

    used_at: tuple[int, int]  # the time, and of the pages of one text the first ones later


class Model:
    """Which pages a pool should have: a dictionary and a clock."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.pages: dict[tuple[bytes, Text], Page] = {}
        self.open: list[list[list[Page]]] = []  # of the lookups under way
        self.now = self.evictions = 0

    def known(self, row: list[tuple[bytes, Text]]) -> list[Page]:
        found = []
        for key in row:
            if key not in self.pages:
                break
            found.append(self.pages[key])
        return found

    def touch(self, pages: list[Page]) -> None:
        self.now += 1
        for index, page in enumerate(pages):
            page.used_at = (self.now, -index)

    def used(self) -> int:
        held = (page for lookup in self.open for row in lookup for page in row)
        return len({id(page) for page in (*held, *self.pages.values())})

    def find(self, rows: list[list[tuple[bytes, Text]]]) -> list[list[Page]]:
        found = []
        for row in rows:
            found.append(self.known(row))
            self.touch(found[-1])
        return found

    def take(self, rows: list[list[tuple[bytes, Text]]]) -> None:
        for row in rows:
            known = self.known(row)
            self.touch(known)
            missing = row[len(known) :]
            while self.used() + len(missing) > self.most:
                # The page used least recently, unless this text needs it.
                oldest = min(self.pages, key=lambda key: self.pages[key].used_at, default=None)
                if not missing or oldest is None or oldest in row:
                    break
                del self.pages[oldest]
                self.evictions += 1
            for key in missing[: max(self.most - self.used(), 0)]:
                self.pages[key] = Page()
            self.touch(self.known(row))


class Calls:
    """A pool, and beside it what it should have."""

    def __init__(self, kv: str, page_size: int, most: int) -> None:
        self.kv, self.page_size = kv, page_size
        self.pool = PrefixPool(most * page_bytes(kv.split("+")[0], page_size) + 1, page_size)
        self.model = Model(most)
        self.open: list[tuple[ExitStack, Prompts, list[list[int]], list[list[Page]]]] = []

    def look_up(self, prompts: Prompts) -> None:
        """Begins a call that does not go on yet."""
        wanted = self.model.find(prompts.pages())
        stack = ExitStack()
        pages = stack.enter_context(self.pool.found(prompts.keys()))
        assert [len(row) for row in pages] == [len(row) for row in wanted]
        self.model.open.append(wanted)
        self.open.append((stack, prompts, [list(row) for row in pages], wanted))

    def go_on(self, which: int, keep: bool) -> None:
        """Ends a call: it takes what it found, reads the rest, and keeps it."""
        if not self.open:
            return
        stack, prompts, pages, wanted = self.open.pop(which % len(self.open))
        cache = KVCache(config(), self.kv)
        with stack:
            columns = give(self.pool, cache, prompts, pages)
        self.model.open.remove(wanted)
        prompts.feed(cache, columns)
        prompts.check(cache, prompts.length)
        if keep:
            self.pool.take(cache.leaves, prompts.keys(), prompts.pads)
            self.model.take(prompts.pages())

    def call(self, prompts: Prompts, keep: bool) -> None:
        self.look_up(prompts)
        self.go_on(-1, keep)

    def take(self, prompts: Prompts) -> None:
        """A call that did not look anything up."""
        cache = KVCache(config(), self.kv)
        prompts.feed(cache, 0)
        self.pool.take(cache.leaves, prompts.keys(), prompts.pads)
        self.model.take(prompts.pages())

    def clear(self) -> None:
        self.pool.clear()
        self.model.pages.clear()

    def check(self) -> None:
        wanted = {hashed(key, self.page_size): page.used_at for key, page in self.model.pages.items()}
        assert list(self.pool._index) == sorted(wanted, key=lambda key: wanted[key])
        assert self.pool.blocks.used == self.model.used()
        assert (self.pool.stats().pages, self.pool.stats().evictions) == (len(wanted), self.model.evictions)
        assert self.pool.stats().nbytes <= self.pool.budget
        check_pool(self.pool)
        # No page is left that cannot be reached.
        assert all(
            text[: -self.page_size] == () or (root, text[: -self.page_size]) in self.model.pages
            for root, text in self.model.pages
        )


def hashed(page: tuple[bytes, Text], page_size: int) -> bytes:
    return page_keys(page[0], torch.tensor(page[1], dtype=torch.long), page_size)[-1]


def give(pool: PrefixPool, cache: KVCache, prompts: Prompts, pages: list[list[int]]) -> int:
    """As a call does: all rows go on from one column. Returns which."""
    ends = [pad + len(row) * prompts.page_size for pad, row in zip(prompts.pads, pages, strict=True)]
    columns = min(ends)
    if all(columns <= pad for pad in prompts.pads):
        return 0
    pool.give(cache.leaves, pages, prompts.pads, columns)
    prompts.check(cache, columns)
    assert all(
        leaf.span.padding.of(len(pages)) == tuple(min(pad, columns) for pad in prompts.pads) for leaf in cache.leaves
    )
    return columns


def check_pool(pool: PrefixPool) -> None:
    """Whether each block is free, or held by the index or a lookup."""
    assert sorted(pool.blocks.free) == [i for i, count in enumerate(pool.blocks.refcounts) if count == 0]
    assert len(set(pool._index.values())) == len(pool._index)
    assert all(pool.blocks.refcounts[page] >= 1 for page in pool._index.values())
    assert all(len(plane) == pool.blocks.size for of_layer in pool._planes for plane in of_layer)
    assert sum(plane.numel() * plane.element_size() for of_layer in pool._planes for plane in of_layer) <= pool.budget
