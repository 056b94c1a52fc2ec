"""Several caches at once, beside what they must hold, and the pages that they share."""

from __future__ import annotations

import gc
from typing import Any

from hfkv import KVCache, KVConfig
from hfkv.stores import PagedStore
from hfkv.stores.block_table import BlockTable
from hfkv.stores.offload.tiers import TieredPages
from hfkv.stores.pages import Pages
from tests.twins import MOST_CACHES, Twin, config


class Caches:
    """Several caches, some of them forks of others, and all pages they have ever had."""

    def __init__(self, kv: str | KVConfig, batch: int, copies: tuple[int, int] | None = None) -> None:
        self.kv = kv
        self.twins = [Twin(KVCache(config(), kv), batch)]
        if copies is not None:
            self.twins[0].cache.expect_copies(*copies)
        self.pages: list[Pages] = []

    def do(self, which: int, name: str, *arguments: Any) -> None:
        twin = self.twins[which % len(self.twins)]
        if name == "fork":
            before = self.used()
            if len(self.twins) < MOST_CACHES:
                self.twins.append(twin.fork(*arguments))
            if twin.cache.kv.store != "auto":
                assert self.used() == before
        elif name == "drop":
            if len(self.twins) > 1:
                self.twins.remove(twin)
        elif name == "append":
            wanted = [store.blocks.used + pages_taken(store, arguments[0]) for store in stores_of(twin)]
            twin.append(*arguments)
            if twin.window is None and wanted:
                assert [store.blocks.used for store in stores_of(twin)] == wanted
        else:
            getattr(twin, name)(*arguments)

    def used(self) -> int:
        return sum({id(store.pages): store.blocks.used for twin in self.twins for store in stores_of(twin)}.values())

    def check(self) -> None:
        for twin in self.twins:
            twin.check()
            check_tables(twin)
        self.check_pages()

    def check_pages(self) -> None:
        """Each page is held as often as block tables list it, and the others are free."""
        for twin in self.twins:
            for store in stores_of(twin):
                if not any(pages is store.pages for pages in self.pages):
                    self.pages.append(store.pages)
        for pages in self.pages:
            stores = [store for twin in self.twins for store in stores_of(twin) if store.pages is pages]
            check_pages(pages, stores)

    def drop_all(self) -> None:
        self.twins.clear()
        if any(pages.stores for pages in self.pages):  # collecting takes longer than all the rest
            gc.collect()
        self.check_pages()
        assert all(not any(pages.blocks.refcounts) for pages in self.pages)


def stores_of(twin: Twin) -> list[PagedStore]:
    return [leaf._store for leaf in twin.cache.leaves if isinstance(leaf._store, PagedStore)]


def check_tables(twin: Twin) -> None:
    """Layers of a group, which have done the same, hold the same pages; offloaded ones each have their own."""
    tables: dict[int, BlockTable] = {}
    for leaf in twin.cache.leaves:
        if isinstance(leaf._store, PagedStore) and not leaf._store.is_offloaded:
            assert tables.setdefault(id(leaf.group), leaf._store.block_table) == leaf._store.block_table


def check_pages(pages: Pages, stores: list[PagedStore]) -> None:
    listed = [page for store in stores for row in store.table for page in row]
    counts = [listed.count(page) for page in range(pages.blocks.size)]
    assert pages.blocks.refcounts == counts
    assert sorted(pages.blocks.free) == [page for page, count in enumerate(counts) if count == 0]
    assert pages.stores == len(stores)
    if isinstance(pages, TieredPages):
        slots = [pages.slot(page) for page, count in enumerate(counts) if count]
        assert sorted([slot for slot in slots if slot >= 0] + pages.device.free) == list(range(len(pages.planes[0])))
        assert sorted([~slot for slot in slots if slot < 0] + pages.host.free) == list(range(pages.host.size))
        assert pages.most is None or len(pages.planes[0]) <= pages.most
        return
    assert all(len(plane) == pages.blocks.size for plane in pages.planes)


def pages_taken(store: PagedStore, count: int) -> int:
    """How many more pages are in use after `count` tokens: new ones, and of the last those that others hold too."""
    room = store.page_size - store.columns[-1][1] if store.columns else 0
    new = -(-max(count - room, 0) // store.page_size) * len(store.table)
    if not room:
        return new
    last = [row[-1] for row in store.table]
    return new + sum(
        last.count(page) - (store.blocks.refcounts[page] == last.count(page))
        for page in set(last)
        if store.blocks.refcounts[page] > 1
    )
