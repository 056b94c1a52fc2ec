"""Parts of work on a CPU: who computes them, with how many of torch's threads, and what they come to."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfkv.codecs import CODECS
from hfkv.kernels.cpu import decode as cpu_decode
from hfkv.kernels.cpu import flash as cpu_flash
from hfkv.kernels.cpu import threads as cpu_threads
from hfkv.kernels.cpu.latent import latent_attention
from hfkv.kernels.cpu.threads import do_parts, num_threads
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.stores.layout import Layout

HEADS, GROUPS, HEAD_DIM, HELD = 2, 4, 32, 5000
# Of two parts that wait for each other, where one thread alone would wait for ever.
PATIENCE = 20  # s


@pytest.fixture(autouse=True)
def shared_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a busy process."""
    monkeypatch.setattr(cpu_threads._cores, "are_shared", lambda: True)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_take_parts_and_each_computes_alone() -> None:
    both = threading.Barrier(2)

    def work(part: int) -> tuple[int, int, int]:
        both.wait(PATIENCE)
        return part, torch.get_num_threads(), threading.get_ident()

    parts, counts, threads = zip(*do_parts(work, range(6)), strict=True)
    assert parts == tuple(range(6))
    assert set(counts) == {1}
    assert len(set(threads)) == 2
    assert torch.get_num_threads() == 2


def test_many_threads_are_shared_by_those_that_take_parts() -> None:
    torch.set_num_threads(9)
    assert set(do_parts(lambda part: torch.get_num_threads(), range(4))) == {2}
    assert do_parts(lambda part: torch.get_num_threads(), range(1)) == [9]


def test_threads_that_do_not_come_are_not_waited_for() -> None:
    release = threading.Event()
    pool = cpu_threads._pool(cpu_threads.os.getpid())
    blocked = [pool.submit(release.wait, PATIENCE) for _ in range(cpu_threads.MOST - 1)]
    me = threading.get_ident()
    try:
        assert do_parts(lambda part: threading.get_ident(), range(3)) == [me] * 3
        assert not any(future.done() for future in blocked)
    finally:
        release.set()


@pytest.mark.parametrize("in_the_caller", [True, False])
def test_an_error_in_a_part_is_raised_when_nobody_works_any_more(in_the_caller: bool) -> None:
    both, me, working = threading.Barrier(2), threading.get_ident(), []

    def work(part: int) -> None:
        working.append(part)
        try:
            both.wait(PATIENCE)
            if (threading.get_ident() == me) == in_the_caller:
                raise ValueError("no such part")
        finally:
            working.remove(part)

    with pytest.raises(ValueError, match="no such part"):
        do_parts(work, range(2))
    assert not working
    assert torch.get_num_threads() == 2
    assert set(do_parts(lambda part: torch.get_num_threads(), range(4))) == {1}


def test_a_count_is_one_threads_alone() -> None:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))

    def fail() -> None:
        with num_threads(1):
            thread.start()
            thread.join()
            seen.append(torch.get_num_threads())
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert seen == [2, 1]
    assert torch.get_num_threads() == 2


def test_callers_of_several_threads() -> None:
    found: dict[int, list[int]] = {}

    def call(caller: int) -> None:
        torch.set_num_threads(2)
        done = [do_parts(lambda part: 10 * caller + part, range(5)) for _ in range(50)]
        found[caller] = [*done[-1], torch.get_num_threads()]
        assert all(results == done[0] for results in done)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert found == {caller: [*range(10 * caller, 10 * caller + 5), 2] for caller in range(4)}


class Noted(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count = getattr(self, "count", 0) + 1
        return func(*args, **(kwargs or {}))


def test_what_only_the_calling_thread_sees_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    me, x = threading.get_ident(), torch.ones(2)

    def work(part: int) -> int:
        x.sum()
        return threading.get_ident()

    with Noted() as noted:
        assert set(do_parts(work, range(4))) == {me}
    assert noted.count == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert set(do_parts(work, range(4))) == {me}
    monkeypatch.setattr(cpu_threads, "_setters", lambda: None)  # no OpenMP library
    assert do_parts(lambda part: (threading.get_ident(), torch.get_num_threads()), range(2)) == [(me, 2)] * 2
    with pytest.raises(RuntimeError, match="OpenMP"), num_threads(1):
        pass


def attended(codec: str, is_paged: bool, softcap: float | None = None) -> Attended:
    """Of a left-padded batch whose rows go on their own, in many stretches."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, HEADS, HELD, HEAD_DIM, generator=generator)
    query, pads = torch.randn(2, HEADS * GROUPS, 1, HEAD_DIM, generator=generator), (0, 2000)
    layout = Layout(HELD)
    planes = [CODECS[codec].encode(part) for part in states[:2]]
    if is_paged:
        planes = [
            tuple(plane.unflatten(2, (-1, 500)).transpose(1, 2).flatten(0, 1).contiguous() for plane in of)
            for of in planes
        ]
        columns = HELD // 500
        layout = Layout(HELD, table=torch.arange(2 * columns).view(2, columns), spans=((0, 500),) * columns)
    keys, values = (Encoded(CODECS[codec], of, HEAD_DIM) for of in planes)
    run = cpu_flash.flash_attention if codec == "none" else cpu_decode.decode_attention
    return run(query, keys, values, layout, Visibility(HELD, pads), Scoring(HEAD_DIM**-0.5, softcap))


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize(
    ("codec", "softcap"), [("none", None), ("none", 20.0), ("int8", None), ("int4", None), ("fp8", None)]
)
def test_attention_is_the_same_on_one_thread_and_on_two(
    codec: str, softcap: float | None, is_paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        two = attended(codec, is_paged, softcap)
        monkeypatch.setattr(cpu_threads._cores, "are_shared", lambda: False)
        together = attended(codec, is_paged, softcap)
    torch.set_num_threads(1)
    one = attended(codec, is_paged, softcap)
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    torch.testing.assert_close(together, one, rtol=0, atol=0)


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_no_product_of_a_step_is_shared_by_threads(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    scores, output = cpu_decode._scores, cpu_decode._output
    for name, function in (("_scores", scores), ("_output", output)):
        monkeypatch.setattr(
            cpu_decode,
            name,
            lambda *args, function=function: (counts.append(torch.get_num_threads()), function(*args))[1],
        )
    attended(codec, is_paged=False)
    assert len(counts) >= 4
    assert set(counts) == {1}


def test_latents_are_the_same_on_one_thread_and_on_two() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, rotary = (torch.randn(1, 1, 20_000, width, generator=generator) for width in (128, 32))
    query = torch.randn(1, 16, 1, 160, generator=generator)
    encoded = [Encoded(CODECS["int8"], CODECS["int8"].encode(part), part.shape[3]) for part in (latents, rotary)]
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(latent_attention(query, *encoded, Layout(20_000), Visibility(20_000, (0,)), Scoring(0.1)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_cores_of_its_own_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads._cores, "are_shared", lambda: False)
    caller = threading.get_ident()
    seen = do_parts(lambda part: (part, threading.get_ident(), torch.get_num_threads()), range(5))
    assert seen == [(part, caller, 2) for part in range(5)]


def test_cores_are_shared_where_threads_lose_them_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now, switches = [10.0], [1000]
    usage = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: types.SimpleNamespace(ru_nivcsw=switches[0]))
    monkeypatch.setattr(cpu_threads, "resource", usage)
    monkeypatch.setattr(cpu_threads.time, "perf_counter", lambda: now[0])
    cores = cpu_threads.Cores()
    assert not cores.are_shared()  # what was before the first look says nothing
    for seconds, more, expected in ((0.1, 0, False), (0.1, 20, True), (0.01, 0, True), (0.1, 3, False), (2, 90, False)):
        now[0] += seconds
        switches[0] += more
        assert cores.are_shared() == expected
    monkeypatch.setattr(cpu_threads, "resource", None)
    assert not cpu_threads.Cores().are_shared()
