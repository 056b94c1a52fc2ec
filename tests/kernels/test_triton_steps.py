"""Steps whose tokens a kernel encodes and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from hfkv.kernels import dispatch
from hfkv.kernels.backend import Asked, Kernel
from tests.kernels.interpreted import Interpreted
from tests.tiny import feed
from tests.unit.test_step import alone, cache_of, equal, everything, operate, steps_made

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted, on a CPU")


class Backend(Interpreted):
    """Interpreted kernels, of which the one that writes can be made to fail."""

    fails = False

    def append(self, asked: Asked) -> Kernel:
        kernel = super().append(asked)
        assert kernel.run is not None
        run = kernel.run

        def append(*args: Any, **kwargs: Any) -> None:
            if self.fails:
                raise MemoryError("no")
            run(*args, **kwargs)

        return kernel._replace(run=append)


@pytest.fixture(autouse=True)
def backend() -> Iterator[Backend]:
    backend = Backend()
    with mock.patch.object(dispatch, "BACKENDS", [backend, *dispatch.BACKENDS]):
        dispatch.forget_choices()
        yield backend
    dispatch.forget_choices()


@pytest.mark.parametrize("kv", ["none", "int8", "int4+paged", "int8+window:6+sinks:2"])
def test_layers_in_step_hold_what_they_would_alone(kv: str) -> None:
    with mock.patch("hfkv.stores.CPU_PAGE_SIZE", 4):
        together = operate(cache_of(kv), 3)
        with alone():
            by_itself = operate(cache_of(kv), 3)
    assert equal(together, by_itself)


def test_a_kernel_is_told_once_a_forward_where_to_write() -> None:
    cache = cache_of("int8")
    cache.reserve(64)
    feed(cache, 1, 9)
    with steps_made() as made:
        feed(cache, 1, 1)
    assert len(made) == 1
    assert made[0].writing is not None


def test_a_kernel_that_fails_leaves_the_cache_as_it_was(backend: Backend) -> None:
    cache = cache_of("int8")
    cache.reserve(64)
    feed(cache, 1, 9)
    feed(cache, 1, 1)
    before = everything(cache)
    backend.fails = True
    with pytest.raises(MemoryError):
        feed(cache, 1, 1)
    backend.fails = False
    assert equal(everything(cache), before)
