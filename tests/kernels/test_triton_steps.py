"""Steps whose tokens a kernel encodes and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from hfkv import KVCache
from hfkv.attention.function import hfkv_attention
from hfkv.kernels import dispatch
from hfkv.kernels.backend import Asked, Kernel
from hfkv.kernels.cpu.backend import CPUBackend
from hfkv.kernels.device_inputs import NUM_SCALARS
from tests.kernels.interpreted import Interpreted
from tests.tiny import feed, llama, llama_config
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


class Tables(CPUBackend):
    """Attention of one query that takes the block table from the device's inputs, as Triton's does."""

    def attention(self, asked: Asked) -> Kernel:
        kernel = super().attention(asked)
        assert kernel.run is not None
        run = kernel.run

        def attend(query: Any, keys: Any, values: Any, layout: Any, *rest: Any, inputs: Any = None) -> Any:
            if inputs is not None and inputs.columns:
                table = inputs.meta[NUM_SCALARS + inputs.batch + 3 * inputs.columns :]
                layout = replace(layout, table=table.view(inputs.batch, inputs.columns).long())
            return run(query, keys, values, layout, *rest)

        return Kernel("tables", "", attend, reads_device_lengths=True)


def test_each_layers_own_pages_are_read_where_a_column_begins() -> None:
    with mock.patch.object(dispatch, "BACKENDS", [Tables()]):
        dispatch.forget_choices()
        cache = KVCache(llama_config(num_hidden_layers=2), "paged+page_size:16")
        cache.reserve(64)
        feed(cache, 2, 16)
        query, module = torch.randn(2, 4, 1, 16), llama(num_hidden_layers=1).model.layers[0].self_attn
        for _ in range(2):  # a page that was given back comes again in another order
            for index, layer in enumerate(cache.layers):
                new = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
                out = hfkv_attention(module, query, *cache.update(*new, index), None)[0]
                keys, values = layer.keys.clone(), layer.values.clone()
                expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
                torch.testing.assert_close(out, expected.transpose(1, 2))
            cache.crop(-1)
