"""Samples in which every two values meet."""

import itertools

from tests.pairwise import pairwise


def test_every_two_values_meet_in_far_fewer_cases() -> None:
    cases = list(itertools.product(range(4), "abc", [None, 1], "xyzw", range(3)))
    chosen = [cases[index] for index in pairwise(cases)]
    assert len(chosen) <= 24
    for i, j in itertools.combinations(range(5), 2):
        assert {(case[i], case[j]) for case in chosen} == {(case[i], case[j]) for case in cases}


def test_what_is_no_whole_product_is_covered_too() -> None:
    cases = [(a, b) for a in range(3) for b in range(3) if a != b]
    assert [cases[index] for index in pairwise(cases)] == cases
    assert pairwise([(1,), (2,)]) == [0, 1]
    assert pairwise([]) == []
