"""`Budget`: what layers that need little leave, the others get, in whatever order they ask."""

from __future__ import annotations

import itertools

import pytest

from hfkv.stores.offload.budget import Budget

PAGE_BYTES, PAGE_SIZE = 10, 4
PAGE = {"page_bytes": PAGE_BYTES, "page_size": PAGE_SIZE}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_what_a_window_leaves_is_shared_by_the_others(order: tuple[int, ...]) -> None:
    budget = Budget(100 * PAGE_BYTES, [4, None, None])
    pages = {layer: budget.share(layer, **PAGE, rows=1, reserved=0) for layer in order}
    assert pages == {0: 2, 1: 49, 2: 49}  # the window's tokens, and a page that is being filled


def test_known_lengths_and_rows_count() -> None:
    budget = Budget(100 * PAGE_BYTES, [None, 4])
    assert budget.share(0, **PAGE, rows=3, reserved=13) == 3 * 4
    budget.divide_anew()
    assert budget.share(0, **PAGE, rows=3, reserved=400) == 100 - 3 * 2
    assert budget.share(1, **PAGE, rows=3, reserved=400) == 3 * 2


def test_a_budget_of_less_than_a_page_of_each_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 30 bytes"):
        Budget(29, [None] * 3).share(0, **PAGE, rows=1, reserved=0)
    assert Budget(None, [None]).share(0, **PAGE, rows=1, reserved=0) is None
