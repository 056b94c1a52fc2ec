"""Caches that share pages, under any sequence of operations: each holds what plain tensors say."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfkv import KVCache, KVConfig, Window
from hfkv.cache.layers.storage import Storage
from hfkv.stores.planes import has_tokens_innermost
from tests.twin_caches import Caches, check_pages, stores_of
from tests.twins import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    MOST_CACHES,
    MOST_ROWS,
    STORES,
    Twin,
    config,
    kv_of,
    run_threads,
)
from tests.unit.test_stores import CopiedBytes

WHICH = st.integers(0, MOST_CACHES - 1)
SEEDS = st.integers(0, 999)
OPERATIONS = st.one_of(
    st.tuples(WHICH, st.just("append"), st.integers(1, 9), SEEDS),
    st.tuples(WHICH, st.just("append"), st.integers(1, 2), SEEDS),
    st.tuples(WHICH, st.just("append"), st.integers(1, 9), SEEDS, st.booleans(), st.booleans()),
    st.tuples(WHICH, st.just("fork"), st.integers(1, 4), st.booleans()),
    st.tuples(WHICH, st.just("fork"), st.just(1), st.just(False)),
    st.tuples(WHICH, st.just("crop"), st.integers(0, 12)),
    st.tuples(WHICH, st.just("reorder"), SEEDS),
    st.tuples(WHICH, st.just("choose"), st.sampled_from(["positions", "mask", "slice"]), SEEDS),
    st.tuples(WHICH, st.just("repeat"), st.integers(1, 3)),
    st.tuples(WHICH, st.just("reset"), st.integers(1, MOST_ROWS)),
    st.tuples(WHICH, st.just("reserve"), st.integers(0, 30)),
    st.tuples(WHICH, st.just("save")),
    st.tuples(WHICH, st.just("drop")),
)


def run(caches: Caches, operations: list[tuple[bool, tuple[Any, ...]]], values_innermost: bool = False) -> None:
    with (
        mock.patch("hfkv.stores.CPU_PAGE_SIZE", 2),  # so that "auto" takes pages for what is tiny
        mock.patch.object(Storage, "values_innermost", values_innermost),
    ):
        caches.do(0, "append", 5, 0)
        for is_inference, operation in operations:
            with torch.inference_mode(is_inference):
                caches.do(*operation)
            caches.check()
            check_order(caches, values_innermost)
        caches.drop_all()


def check_order(caches: Caches, values_innermost: bool) -> None:
    for leaf in (leaf for twin in caches.twins for leaf in twin.cache.leaves if leaf._store is not None):
        planes, values = leaf.store.planes, leaf.parts["value"].planes.start
        is_turned = values_innermost and not leaf.codecs.value.is_lossless
        wanted = [is_turned and index == values for index in range(len(planes))]
        assert list(map(has_tokens_innermost, planes)) == wanted


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["none", "int8", "fp8", "k:int8+v:none", "k:fp8+v:int8"]),
    st.sampled_from(STORES),
    st.integers(1, MOST_ROWS),
    st.sampled_from([None, (2, 5), (4, 1), (2, 30)]),
    st.lists(st.tuples(st.booleans(), OPERATIONS), min_size=3, max_size=20),
    st.booleans(),
)
def test_any_sequence_of_operations_on_several_caches_equals_plain_tensors(
    codec: str,
    store: str,
    batch: int,
    copies: tuple[int, int] | None,
    operations: list[tuple[bool, tuple[Any, ...]]],
    values_innermost: bool,
) -> None:
    run(Caches(kv_of(codec, store), batch, copies), operations, values_innermost)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["none", "int8", "fp8", "k:int8+v:none", "k:fp8+v:int8"]),
    st.sampled_from(STORES),
    st.builds(
        Window,
        st.integers(1, 9),
        st.integers(0, 3),
        global_layers=st.sampled_from([(), (0,)]),
        global_heads=st.sampled_from([{}, {1: [1]}]),
    ),
    st.integers(1, MOST_ROWS),
    st.lists(st.tuples(st.booleans(), OPERATIONS), min_size=3, max_size=20),
    st.booleans(),
)
def test_any_sequence_of_operations_on_several_windowed_caches_equals_plain_tensors(
    codec: str,
    store: str,
    window: Window,
    batch: int,
    operations: list[tuple[bool, tuple[Any, ...]]],
    values_innermost: bool,
) -> None:
    caches = Caches(replace(KVConfig.parse(kv_of(codec, store)), window=window), batch)
    run(caches, operations, values_innermost)


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_fork_copies_its_last_page_only_and_not_before_it_is_written_to(codec: str, copies: int) -> None:
    page_size, length = 4, 4 * 25 + 3
    twin = Twin(KVCache(config(), f"{codec}+paged+page_size:{page_size}"), 1)
    twin.append(length, 0)
    twin.fork(1, deep=False).append(40, 0)  # and is gone: eleven free pages, no plane has to grow
    token_bytes, (store, *_) = twin.cache.held_bytes() // length, stores_of(twin)
    with CopiedBytes() as counter:
        forked = twin.cache.fork(copies)
    assert counter.total <= 2 * 8 * (copies + 1) * length, "more than the ids was copied"
    assert store.blocks.used == 26
    states = [torch.randn(copies, HEADS, 1, HEAD_DIM) for _ in range(2)]
    new_bytes = 4 * sum(state.numel() for state in states)
    with CopiedBytes() as counter:
        for layer_idx in range(LAYERS):
            forked.update(states[0], states[1], layer_idx)
    # The last page is read and written once a row, and the new token beside it.
    assert counter.total <= copies * 2 * page_size * token_bytes + 2 * LAYERS * new_bytes
    assert store.blocks.used == 26 + copies
    with CopiedBytes() as counter:
        twin.cache.update(states[0][:1], states[1][:1], 0)
    # Nobody else holds its own last page any more.
    assert counter.total <= 2 * new_bytes // copies
    assert store.blocks.used == 26 + copies


def test_a_cache_that_was_assigned_knows_its_tokens_again_once_it_is_reset() -> None:
    twin = Twin(KVCache(config()), 2)
    twin.append(5, 0)
    layer = twin.cache.layers[0]
    layer.keys, layer.values = layer.keys, layer.values
    assert twin.cache.holds_tokens is None
    twin.reset(3)
    twin.append(4, 1)
    twin.check()


@pytest.mark.parametrize("kv", ["none+paged+page_size:2", "int8+paged+page_size:4", "none+paged+page_size:1"])
def test_threads_that_fork_one_cache_go_on_by_themselves(kv: str) -> None:
    num_threads, iterations = 6, 60
    base = Twin(KVCache(config(), kv), 2)
    base.append(7, 0)
    pages = [store.pages for store in stores_of(base)]
    left: list[Twin] = []  # by one thread, for any other to go on with

    def work(index: int) -> None:
        choice = random.Random(index)
        for _ in range(iterations):
            twin = base.fork(choice.randint(1, 2), deep=False)
            for _ in range(choice.randint(1, 6)):
                seed = choice.randrange(999)
                match choice.choice(["append", "append", "crop", "reorder", "choose", "fork", "swap"]):
                    case "append":
                        twin.append(choice.randint(1, 5), seed)
                    case "crop":
                        twin.crop(choice.randint(1, 9))
                    case "reorder":
                        twin.reorder(seed)
                    case "choose":
                        twin.choose("positions", seed)
                    case "fork":
                        twin = twin.fork(1, deep=True)
                    case _:
                        left.append(twin)
                        twin = left.pop(0)
                twin.check()
        base.check()

    run_threads(num_threads, work)
    for twin in left:
        twin.check()
    left.clear()
    for of_layer, store in zip(pages, stores_of(base), strict=True):
        check_pages(of_layer, [store])
