"""Errors that another process is sent."""

import pickle

import pytest

from hfkv.bench import BenchError
from hfkv.cli.errors import CommandError
from hfkv.policy.errors import CacheMemoryError, RequestError


@pytest.mark.parametrize("kind", [RequestError, BenchError, CommandError])
def test_an_error_comes_as_it_was(kind: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(kind("no room")))
    assert (type(again), str(again)) == (kind, "no room")


def test_a_memory_error_comes_without_its_cache_and_says_so() -> None:
    error = CacheMemoryError("no memory", lambda: "cannot be pickled, and is large")
    error.add_note("layer 3")
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(again) is CacheMemoryError
    assert str(again) == "no memory. This copy of the error came without its cache"
    assert (again.cache, again.__notes__) == (None, ["layer 3"])
