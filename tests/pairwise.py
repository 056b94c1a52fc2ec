"""Pairwise samples: of a product of parameters, the few cases in which every two values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import pytest

Case = tuple[Hashable, ...]


def pairwise(cases: Sequence[Case]) -> list[int]:
    """Indices of cases that together hold every pair of values that any case holds; the same at every call.

    Args:
        cases: each a value for every parameter.
    """
    pairs = [_pairs(case) for case in cases]
    missing: set[tuple[int, int, Hashable, Hashable]] = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: (len(pairs[index] & missing), -index))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def _pairs(case: Case) -> set[tuple[int, int, Hashable, Hashable]]:
    if len(case) == 1:
        return {(0, 0, case[0], case[0])}
    return {(i, j, case[i], case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def leave_the_rest_for_slow(items: Sequence[pytest.Item]) -> None:
    """Marks as `slow` what a pairwise sample of a test marked `pairwise` leaves out: the slow tier has the others."""
    by_test: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairwise") is not None:
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in by_test.values():
        values = [tuple(repr(value) for _, value in sorted(case.callspec.params.items())) for case in cases]
        kept = set(pairwise(values))
        for index, case in enumerate(cases):
            if index not in kept:
                case.add_marker(pytest.mark.slow)
