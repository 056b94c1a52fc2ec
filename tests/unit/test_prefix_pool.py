"""PrefixPool by itself: what it gives is what was computed, and what it lets go of is what was used least recently."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfkv import KVCache
from hfkv.cache.layers.storage import Storage
from hfkv.sharing.prefix_pool import PrefixPool
from tests.prompts import ROOTS, Calls, Prompts, Text, check_pool, give, page_bytes
from tests.twins import config, run_threads


@st.composite
def prompts_of(draw: st.DrawFn, page_size: int, beginnings: list[list[int]]) -> Prompts:
    """Rows that begin alike, more or less, or are all alike."""
    beginning = draw(st.sampled_from(beginnings))
    if draw(st.booleans()):
        texts = [tuple(beginning) or (0,)] * draw(st.integers(1, 3))
    else:
        kept = st.integers(0, len(beginning))
        rows = draw(
            st.lists(st.tuples(kept, st.lists(st.integers(0, 1), min_size=1, max_size=8)), min_size=1, max_size=3)
        )
        texts = [(*beginning[:count], *rest) for count, rest in rows]
    return Prompts(draw(st.sampled_from(ROOTS)), texts, page_size)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[Any, ...]]]:
    page_size = draw(st.sampled_from([1, 2, 4]))
    beginnings = draw(st.lists(st.lists(st.integers(0, 1), max_size=16), min_size=1, max_size=2))
    prompts = prompts_of(page_size, beginnings)
    actions = st.one_of(
        st.tuples(st.just("call"), prompts, st.just(True)),
        st.tuples(st.just("call"), prompts, st.booleans()),
        st.tuples(st.just("take"), prompts),
        st.tuples(st.just("look_up"), prompts),
        st.tuples(st.just("go_on"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("clear")) if draw(st.booleans()) else st.tuples(st.just("call"), prompts, st.just(True)),
    )
    return page_size, draw(st.lists(actions, min_size=2, max_size=14))


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    histories(),
    st.sampled_from(["none", "int8", "int8+contiguous", "none+paged+page_size:2", "int8+paged+page_size:4"]),
    st.integers(1, 14),
    st.booleans(),
)
def test_any_sequence_of_calls_is_given_what_was_computed(
    history: tuple[int, list[tuple[Any, ...]]], kv: str, most: int, values_innermost: bool
) -> None:
    page_size, actions = history
    calls = Calls(kv, page_size, most)
    with mock.patch.object(Storage, "values_innermost", values_innermost):
        for name, *arguments in actions:
            getattr(calls, name)(*arguments)
            calls.check()
        while calls.open:
            calls.go_on(0, keep=True)
            calls.check()
    assert calls.pool.blocks.used == len(calls.pool._index)
    calls.clear()
    calls.check()
    assert not calls.pool.blocks.used


@st.composite
def long_prompts(draw: st.DrawFn) -> list[tuple[Prompts, list[int]]]:
    """Some that begin alike, and by how many columns each is read."""
    page_size = draw(st.sampled_from([1, 2, 4]))
    beginning = draw(st.lists(st.integers(0, 1), min_size=8, max_size=20))
    prompts = prompts_of(page_size, [beginning])
    return draw(st.lists(st.tuples(prompts, st.lists(st.integers(1, 9), min_size=1)), min_size=2, max_size=4))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    long_prompts(), st.integers(1, 9), st.integers(0, 3), st.sampled_from(["none", "none+paged+page_size:2", "int8"])
)
def test_the_pages_that_windows_leave_are_what_was_computed(
    history: list[tuple[Prompts, list[int]]], size: int, sinks: int, kv: str
) -> None:
    pool = PrefixPool(1 << 20, history[0][0].page_size)
    for prompts, counts in history:
        cache = KVCache(config(), f"{kv}+window:{size}+sinks:{sinks}")
        with pool.found(prompts.keys()) as pages:
            columns = give(pool, cache, prompts, pages)
        for count in itertools.cycle(counts):
            if columns >= prompts.length:
                break
            before, columns = columns, min(columns + count, prompts.length)
            read = prompts.until(columns)
            read.feed(cache, before)
            for leaf in cache.leaves:
                leaf.span.padding.learn(tuple(read.pads), before)  # as the attention does
            pool.take(cache.leaves, read.keys(), read.pads)
        for earlier, _ in history:
            with pool.found(earlier.keys()) as pages:
                give(pool, KVCache(config(), kv), earlier, pages)


@pytest.mark.parametrize("most", [2, 5, 30])
def test_threads_that_share_a_pool_are_given_what_was_computed(most: int) -> None:
    num_threads, iterations, page_size = 6, 40, 2
    pool = PrefixPool(most * page_bytes("int8", page_size), page_size)

    def texts(choice: random.Random) -> Iterator[Text]:
        beginning = [choice.randint(0, 1) for _ in range(choice.randint(0, 8))]
        for _ in range(choice.randint(1, 3)):
            end = [choice.randint(0, 1) for _ in range(choice.randint(1, 5))]
            yield (*beginning[: choice.randint(0, 8)], *end)

    def work(index: int) -> None:
        choice = random.Random(index)
        for _ in range(iterations):
            prompts = Prompts(choice.choice(ROOTS), list(texts(choice)), page_size)
            cache = KVCache(config(), "int8+paged+page_size:2")
            with pool.found(prompts.keys()) as pages:
                columns = give(pool, cache, prompts, pages)
            prompts.feed(cache, columns)
            pool.take(cache.leaves, prompts.keys(), prompts.pads)
            prompts.check(cache, prompts.length)
            if choice.random() < 0.02:
                pool.clear()

    run_threads(num_threads, work)
    check_pool(pool)
    assert pool.blocks.used == len(pool._index) <= most
    assert all(count <= 1 for count in pool.blocks.refcounts)
