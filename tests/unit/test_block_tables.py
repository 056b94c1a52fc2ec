"""One block table for all layers of a group: who holds it, who leaves it, and what a failure leaves behind."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

from hfkv import KVCache
from hfkv.stores import ContiguousStore, PagedStore, Store
from tests.tiny import llama_config

LAYERS = 4


def cache_of(kv: str = "paged+page_size:4") -> KVCache:
    return KVCache(llama_config(num_hidden_layers=LAYERS), kv)


def forward(cache: KVCache, count: int, rows: int = 1, layers: range = range(LAYERS)) -> None:
    for layer in layers:
        states = torch.randn(rows, 2, count, 16)
        cache.update(states, states, layer)


def stores(cache: KVCache) -> list[PagedStore]:
    return [leaf.store for leaf in cache.leaves]


def is_one_table(cache: KVCache) -> bool:
    first = stores(cache)[0]
    return all(store.block_table is first.block_table and store.blocks is first.blocks for store in stores(cache))


@pytest.mark.parametrize("kv", ["paged+page_size:4", "int8+paged+page_size:4", "window:8+paged+page_size:4"])
def test_layers_hold_one_table_whatever_happens(kv: str) -> None:
    cache = cache_of(kv)
    seen = []

    def check(what: str) -> None:
        seen.append((what, is_one_table(cache)))

    forward(cache, 10), check("prefill")
    for _ in range(6):
        forward(cache, 1)
    check("decode")
    cache.batch_repeat_interleave(3), check("repeat")
    fork = cache.fork(2)
    for _ in range(5):
        forward(cache, 1, 3), cache.reorder_cache(torch.tensor([0, 0, 2]))
        forward(fork, 1, 6)
    check("beams beside a fork")
    seen.append(("the fork", is_one_table(fork)))
    del fork
    gc.collect()
    if "window" not in kv:
        cache.crop(-3), check("crop")
    cache.batch_select_indices([1]), check("select")
    forward(cache, 9), check("more")
    cache = pickle.loads(pickle.dumps(cache))
    forward(cache, 5), check("pickled, and more")
    cache.reset()
    forward(cache, 5, 2), check("reset")
    assert [what for what, is_one in seen if not is_one] == []


def test_a_layer_driven_alone_leaves_the_table_and_keeps_its_tokens() -> None:
    cache = cache_of()
    forward(cache, 6)
    forward(cache, 3, layers=range(2, 3))  # others have not seen them
    before = [tuple(plane.clone() for plane in store.read()) for store in stores(cache)]
    forward(cache, 3, layers=range(2))
    cache.crop(-1)
    forward(cache, 1)
    lengths = [store.length for store in stores(cache)]
    assert lengths == [9, 9, 9, 6]
    for store, planes in zip(stores(cache), before, strict=True):
        kept = min(planes[0].shape[2], store.length - 1)
        for now, then in zip(store.read(), planes, strict=True):
            assert torch.equal(now[:, :, :kept], then[:, :, :kept])
    for store in stores(cache):
        assert store.blocks.refcounts.count(1) == len(store.columns)


def test_pages_of_a_fork_made_again_are_not_those_of_the_first() -> None:
    """The same request from the same state has the same result, but two forks may not write to one page."""
    cache = cache_of()
    forward(cache, 6)
    forks = [cache.fork(), cache.fork()]
    for fork in forks:
        forward(fork, 1)
    last = [{store.block_table.rows[0][-1] for store in stores(fork)} for fork in forks]
    assert not last[0] & last[1]
    assert stores(cache)[0].blocks.used == 1 + 3


def test_a_failed_change_leaves_counts_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of()
    forward(cache, 4)
    held = [(store.block_table, store.blocks) for store in stores(cache)]

    def none_left(self: PagedStore, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        raise MemoryError("none left")

    monkeypatch.setattr(PagedStore, "allocate", none_left)
    with pytest.raises(MemoryError, match="none left"):
        forward(cache, 9)
    assert [(store.block_table, store.blocks) for store in stores(cache)] == held
    monkeypatch.undo()
    forward(cache, 9)
    assert is_one_table(cache)


def test_a_layer_without_memory_works_out_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers have got what was reserved; one that cannot takes what it needs, and holds pages of its own."""
    cache = cache_of()
    cache.reserve(64)
    allocate = PagedStore.allocate

    def scarce(self: PagedStore, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if self is cache.leaves[2]._store and shape[0] > 4:
            raise MemoryError("no more than 4 pages here")
        return allocate(self, shape, like)

    monkeypatch.setattr(PagedStore, "allocate", scarce)
    forward(cache, 10)
    assert [len(store.planes[0]) for store in stores(cache)] == [16, 16, 3, 16]
    assert [store.length for store in stores(cache)] == [10] * LAYERS


def test_planes_that_were_lent_to_one_layer_alone_are_as_large_in_all() -> None:
    lender = cache_of()
    forward(lender, 30)
    cache = cache_of()
    cache.leaves[0].lend(list(stores(lender)[0].planes))
    forward(cache, 10)
    assert [len(store.planes[0]) for store in stores(cache)] == [8] * LAYERS
    forward(cache, 20)
    assert is_one_table(cache)


@pytest.mark.parametrize("kv", ["", "int8+", "window:8+"])
@pytest.mark.parametrize("first_failure", range(4))
def test_what_finds_no_memory_to_shrink_goes_on_as_it_is(
    kv: str, first_failure: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [cache_of(kv + "paged+page_size:4") for _ in range(2)]
    for cache in caches:
        torch.manual_seed(0)
        forward(cache, 90, 6)
    allocate, calls = Store.allocate, iter(range(1000))

    def scarce(self: Store, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if next(calls) >= first_failure:
            raise MemoryError("none left")
        return allocate(self, shape, like)

    monkeypatch.setattr(Store, "allocate", scarce)
    caches[0].batch_select_indices([1])
    monkeypatch.undo()
    caches[1].batch_select_indices([1])
    for _ in range(3):
        for cache in caches:
            torch.manual_seed(1)
            forward(cache, 1)
    for one, other in zip(*map(stores, caches), strict=True):
        assert one.length == other.length
        for plane, expected in zip(one.read(), other.read(), strict=True):
            assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:4"])
def test_a_window_that_finds_no_memory_to_shrink_has_let_go_of_its_tokens(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(f"window:8+{store}")
    forward(cache, 590)

    def none_left(self: Store, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        raise MemoryError("none left")

    for kind in (ContiguousStore, PagedStore):
        monkeypatch.setattr(kind, "allocate", none_left)
    forward(cache, 1)
    monkeypatch.undo()
    forward(cache, 1)
    assert {store.length for store in stores(cache)} == {4 + 8}  # sinks, and the newest


def test_a_reorder_that_failed_midway_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of("contiguous")
    forward(cache, 5, 4)
    allocate, failing = ContiguousStore.allocate, cache.leaves[1].store

    def scarce(self: Store, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if self is failing:
            raise MemoryError("none left")
        return allocate(self, shape, like)

    monkeypatch.setattr(ContiguousStore, "allocate", scarce)
    with pytest.raises(MemoryError, match="none left"):
        cache.reorder_cache(torch.tensor([1, 1, 1, 1]))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="its layers hold different tokens"):
        forward(cache, 1, 4)
    cache.reset()
    forward(cache, 1, 4)


def test_a_pickle_counts_the_stores_that_are_in_it() -> None:
    cache = cache_of()
    forward(cache, 40)
    fork = cache.fork()
    alone = pickle.loads(pickle.dumps(cache))
    both = pickle.loads(pickle.dumps((cache, fork)))
    assert [store.pages.stores for store in stores(alone)] == [1] * LAYERS
    assert [store.pages.stores for store in stores(both[0])] == [2] * LAYERS
    alone.crop(-38)
    assert stores(alone)[0].blocks.used == 1
    assert alone.nbytes() < cache.nbytes() / 4
    both[0].crop(-38)
    assert stores(both[1])[0].blocks.used == 10
