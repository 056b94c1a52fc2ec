"""Stores against a plain tensor model, their bytes, and what they copy."""

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hfkv.stores import Budget, ContiguousStore, Offload, OffloadedStore, PagedStore, Store, copy_rows
from hfkv.stores.planes import has_tokens_innermost


def make(
    kind: str,
    bound: int | None = None,
    offload: bool = False,
    budget: int | None = None,
    innermost: tuple[int, ...] = (),
) -> Store:
    given: dict[str, Any] = {"bound": bound, "tokens_innermost": innermost}
    if kind == "contiguous":
        return ContiguousStore(**given)
    page_size = int(kind.removeprefix("paged"))
    if offload:
        return OffloadedStore(page_size, Offload(Budget(budget, [bound])).place(0), **given)
    return PagedStore(page_size, **given)


def tokens(batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, count, 3), torch.randint(0, 99, (batch, 1, count, 2), dtype=torch.int8)


KINDS = ("contiguous", "paged1", "paged4", "paged16")
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 40)),
        st.tuples(st.just("drop"), st.floats(0, 1), st.floats(0, 1)),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    ),
    max_size=25,
)


@settings(max_examples=120, deadline=None)
@given(
    operations=operations,
    kind=st.sampled_from(KINDS),
    bound=st.sampled_from([None, 6, 30]),
    offload=st.booleans(),
    budget=st.sampled_from([None, 700, 5000]),
    innermost=st.sampled_from([(), (1,), (0, 1)]),
)
def test_any_sequence_of_operations_equals_a_plain_tensor(
    operations: list[tuple[Any, ...]],
    kind: str,
    bound: int | None,
    offload: bool,
    budget: int | None,
    innermost: tuple[int, ...],
) -> None:
    store, expected = make(kind, bound, offload, budget, innermost), list(tokens(3, 0))
    store.append(tuple(expected))
    for name, *given_values in operations:
        batch, length = expected[0].shape[0], expected[0].shape[2]
        if name == "append":
            new = tokens(batch, given_values[0])
            store.append(new)
            expected = [torch.cat(pair, dim=2) for pair in zip(expected, new, strict=True)]
        elif name == "drop":
            start, stop = sorted(int(value * length) for value in given_values)
            store.drop(start, stop)
            expected = [torch.cat((plane[:, :, :start], plane[:, :, stop:]), dim=2) for plane in expected]
        elif name == "truncate":
            keep = int(given_values[0] * length)
            store.truncate(keep)
            expected = [plane[:, :, :keep] for plane in expected]
        else:
            rows = torch.tensor([row % batch for row in given_values[0]])
            store.select(rows)
            expected = [plane[rows] for plane in expected]
        held = store.read()
        assert store.length == expected[0].shape[2]
        for plane, wanted in zip(held, expected, strict=True):
            assert torch.equal(plane, wanted)
        for plane, wanted in zip(read_in_runs(store), expected, strict=True):
            assert torch.equal(plane, wanted)
        check_order(store, innermost)
    if isinstance(store, PagedStore):
        check_refcounts(store)


def read_in_runs(store: Store) -> list[torch.Tensor]:
    """The planes from `Store.runs`, each taken before the next is asked for."""
    runs = [(run.begin, run.layout.read(run.planes, 0, run.layout.length)) for run in store.runs(store.length)]
    assert [begin for begin, _ in runs] == list(
        itertools.accumulate((planes[0].shape[2] for _, planes in runs), initial=0)
    )[:-1]
    return [torch.cat(parts, dim=2) for parts in zip(*(planes for _, planes in runs), strict=True)] or list(
        store.read()
    )


def check_order(store: Store, innermost: tuple[int, ...]) -> None:
    """Every plane that the store holds, or has held tokens ready in, lies as it was told."""
    planes = [list(store.planes), *(run.planes for run in store.runs(store.length))]
    if isinstance(store, OffloadedStore) and store.planes:
        planes += store.tiers.host.segments
    for of_all in planes:
        assert [has_tokens_innermost(plane) for plane in of_all] == [index in innermost for index in (0, 1)]
    assert all(read.stride(3) == 1 for read in store.read() if read.numel())


def check_refcounts(store: PagedStore) -> None:
    holders = [page for row in store.table for page in row]
    counts = [holders.count(page) for page in range(store.blocks.size)]
    assert store.blocks.refcounts == counts
    assert sorted(store.blocks.free) == [page for page, count in enumerate(counts) if count == 0]


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes every operation writes, views and allocations aside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1]
        written = {"copy_": 0, "index_put_": 2, "_index_put_impl_": 2}
        if name in written:
            source = args[1] if name == "copy_" else args[2]
            self.total += source.numel() * source.element_size()
            self.names.add(name)
        elif isinstance(out, torch.Tensor) and name in ("cat", "clone", "index_select", "index", "index.Tensor"):
            self.total += out.numel() * out.element_size()
            self.names.add(name)
        return out


def grow(store: Store, count: int, first: int = 0) -> Iterator[int]:
    """Appends one token at a time; yields the bytes allocated after each."""
    if first:
        store.append(tokens(1, first))
    for _ in range(count):
        store.append(tokens(1, 1))
        yield store.nbytes()


@pytest.mark.parametrize("kind", ["contiguous", "paged4", "paged16"])
def test_appending_one_by_one_copies_a_constant_number_of_times(kind: str) -> None:
    copied = []
    for count in (500, 4000):
        store = make(kind)
        with CopiedBytes() as counter:
            list(grow(store, count))
        assert "cat" not in counter.names
        copied.append(counter.total / store.held_bytes())
    assert copied[1] < 7
    assert copied[1] < 1.3 * copied[0]


@pytest.mark.parametrize("kind", ["contiguous", "paged4"])
def test_a_window_copies_a_constant_number_of_bytes_a_step(kind: str) -> None:
    store = make(kind, bound=68)
    store.append(tokens(1, 68))
    rates = []
    for _ in range(3):
        with CopiedBytes() as counter:
            for _ in range(1020):
                store.drop(4, 5)
                store.append(tokens(1, 1))
        rates.append(counter.total / 1020)
    token_bytes = store.held_bytes() / 68
    assert rates[2] == pytest.approx(rates[1], rel=0.02)
    assert rates[2] < 20 * token_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_grown_without_a_known_length_is_at_most_1_3_of_held(kind: str) -> None:
    store = make(kind)
    page = getattr(store, "page_size", 0)
    for allocated in grow(store, 700):
        token_bytes = store.held_bytes() / store.length
        assert allocated <= 1.3 * store.held_bytes() + page * token_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_with_the_length_known_allocated_is_what_is_needed(kind: str, batch: int) -> None:
    store = make(kind)
    store.reserve(1000)
    store.append(tokens(batch, 37))
    first = [plane.data_ptr() for plane in store.planes]
    for _ in range(963):
        store.append(tokens(batch, 1))
    token_bytes = store.held_bytes() / store.length / batch
    page = getattr(store, "page_size", 0)
    assert store.nbytes() <= 1.02 * store.held_bytes() + batch * page * token_bytes
    assert [plane.data_ptr() for plane in store.planes] == first, "the planes were reallocated"


@pytest.mark.parametrize("kind", ["contiguous", "paged4"])
@pytest.mark.parametrize("prefill", [1, 60, 5000])
def test_a_window_allocates_little_more_than_it_holds(kind: str, prefill: int) -> None:
    store = make(kind, bound=64)
    store.append(tokens(1, prefill))
    sizes = set()
    for step in range(2000):
        if store.length > 63:
            store.drop(4, 4 + store.length - 63)
        store.append(tokens(1, 1))
        if step > 200:
            sizes.add(store.nbytes())
    page = getattr(store, "page_size", 0)
    assert len(sizes) == 1, "bytes change after the window has filled"
    assert sizes.pop() <= 1.3 * store.held_bytes() + 2 * page * store.held_bytes() / store.length


def test_rows_selected_twice_share_pages_until_they_are_written() -> None:
    store = PagedStore(4)
    store.append(tokens(2, 10))
    before = store.held_bytes()
    store.select(torch.tensor([0, 0, 1, 0]))
    assert store.held_bytes() == before
    assert store.blocks.used == 6
    with CopiedBytes() as counter:
        store.append(tokens(4, 1))
    # Row 0 has three holders: two copies of its last page are made; row 1 keeps its own.
    assert store.blocks.used == 6 + 2
    page_bytes = store.nbytes() // store.blocks.size
    assert counter.total <= 3 * 2 * page_bytes + store.nbytes()
    store.select(torch.tensor([2]))
    assert store.blocks.used == 3


def test_nbytes_is_the_sum_of_the_real_storages() -> None:
    for kind in KINDS:
        store = make(kind)
        store.append(tokens(2, 21))
        storages = {plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes() for plane in store.planes}
        assert store.nbytes() == sum(storages.values())


@pytest.mark.parametrize("innermost", [(), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged4"])
def test_a_store_of_any_dtype_comes_out_of_a_pickle(kind: str, dtype: torch.dtype, innermost: tuple[int, ...]) -> None:
    store = make(kind, innermost=innermost)
    store.append((torch.randn(2, 2, 9, 3).abs().to(dtype), torch.ones(2, 1, 9, 2)))
    again, fork = pickle.loads(pickle.dumps((store, store.fork(torch.tensor([0, 1])))))
    for twin in (again, fork, copy.deepcopy(store)):
        for ours, theirs in zip(store.read(), twin.read(), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.float(), theirs.float())
        twin.append(tuple(plane[:, :, :3] for plane in store.read()))
        check_order(twin, innermost)
        assert (store.length, twin.length) == (9, 12)
    assert (again.planes is fork.planes) == (kind != "contiguous")  # they still share their pages


@pytest.mark.parametrize("kind", ["contiguous", "paged4"])
def test_planes_that_lie_otherwise_are_not_taken_over(kind: str) -> None:
    for orders in itertools.product([(), (1,)], repeat=2):
        stores = [make(kind, innermost=order) for order in orders]
        stores[0].reserve(12)
        stores[0].append(tokens(2, 9))
        lent, stores[1].lent = stores[0].planes, list(stores[0].planes)
        stores[1].append(tokens(2, 9))
        taken = [ours is theirs for ours, theirs in zip(stores[1].planes, lent, strict=True)]
        assert taken == [orders[0] == orders[1]] * 2
        check_order(stores[1], orders[1])


@pytest.mark.parametrize("innermost", [(), (1,)], ids=str)
def test_rows_that_go_over_to_pages_keep_the_order(innermost: tuple[int, ...]) -> None:
    store = make("contiguous", innermost=innermost)
    store.append(tokens(2, 9))
    rows = torch.tensor([0, 0, 1])
    copied = copy_rows(store, rows, "auto", page_size=2)
    assert isinstance(copied, PagedStore)
    check_order(copied, innermost)
    for ours, theirs in zip(copied.read(), store.read(), strict=True):
        assert torch.equal(ours, theirs[rows])
