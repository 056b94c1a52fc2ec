"""The threads of the native kernels: they change no bit, serve whoever calls, and are not missed after a fork."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.native import library as native
from hfkv.kernels.native.kernels import append, attend
from hfkv.kernels.native.latent import attend_latents
from hfkv.stores.layout import Layout
from tests.kernels.cases import case
from tests.kernels.test_cpu_latent import latent_case
from tests.kernels.test_native_library import ALL, same_bytes

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_not() or "none")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("codec", ALL)
def test_threads_change_no_bit(codec: str) -> None:
    given = case(codec, batch=2, length=9000, pads=(0, 4100), num_queries=3)
    latents = latent_case(codec, "native", batch=2, length=3000, pads=(0, 900), num_queries=20)
    for kernel, of in ((attend, given), (attend_latents, latents)):
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(kernel(*of.arguments))
        for one in results[1:]:
            assert torch.equal(one.out, results[0].out)
            assert torch.equal(one.lse, results[0].lse)
    new = torch.randn(2, 2, 700, 64)
    written = []
    for count in (1, 2):
        planes = [torch.zeros_like(plane) for plane in CODECS[codec].encode(new)]
        with threads(count):
            append(new, new, *(Encoded(CODECS[codec], tuple(planes), 64),) * 2, Layout(0))
        written.append(planes)
    assert same_bytes(*written)


def test_calls_at_once_from_many_threads_share_the_pool() -> None:
    given = case("int8", length=9000)
    with threads(2):
        expected = attend(*given.arguments).out

        def calls(_: int) -> bool:
            return all(torch.equal(attend(*given.arguments).out, expected) for _ in range(20))

        with ThreadPoolExecutor(4) as program:
            assert all(program.map(calls, range(4)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_attends_too() -> None:
    given = case("int8", length=9000)
    with threads(2):
        expected = attend(*given.arguments).out
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:  # no thread of the parent's pool is here
                os.write(write, b"y" if torch.equal(attend(*given.arguments).out, expected) else b"n")
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as said:
            assert said.read() == b"y"
        os.waitpid(child, 0)
