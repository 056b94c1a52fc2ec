"""Values with tokens innermost: who keeps them so, who reads and writes them, and that nothing else comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import hfkv
from hfkv import KVCache
from hfkv.cache.layers.storage import Storage
from hfkv.cli.doctor.layers import describe_layers
from hfkv.kernels.backend import MANY, Asked, Backend, Kernel
from hfkv.kernels.dispatch import append_kernel, attention_kernel
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.merge import Attended
from hfkv.kernels.naive import attention_naive
from hfkv.kernels.native import kernels as native
from hfkv.sharing.files.cache_file import load_cache, save_cache
from hfkv.stores.planes import has_tokens_innermost
from tests import twins
from tests.kernels.cases import Case, case, check
from tests.registered import registered
from tests.tiny import feed, greedy, llama, prompt
from tests.twins import Twin
from tests.zoo import NAMED

CPU = torch.device("cpu")
CODECS = ("int8", "int4", "fp8", "k:int8+v:int4")


def turned(given: Case) -> Case:
    """The same tokens, those of the values' data side by side."""
    data, *scales = given.values.planes
    data = data.transpose(2, 3).contiguous().transpose(2, 3)
    assert has_tokens_innermost(data)
    return Case(**{**vars(given), "values": Encoded(given.values.codec, (data, *scales), given.values.head_dim)})


def orders(cache: KVCache) -> set[tuple[bool, ...]]:
    return {tuple(map(has_tokens_innermost, leaf.store.planes)) for leaf in cache.leaves}


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("codec", CODECS)
def test_what_a_kernel_cannot_read_is_read_by_another(codec: str, num_queries: int, page_size: int | None) -> None:
    given = case(codec, batch=2, num_queries=num_queries, length=45, page_size=page_size)
    asked = codec, torch.float32, CPU, num_queries, (64, 64)
    kernel = attention_kernel(*asked, True)
    assert kernel.name != "native decode"
    assert kernel.run is not None
    check(kernel.run, turned(given))
    for ours, theirs in zip(kernel.run(*turned(given).arguments), kernel.run(*given.arguments), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(attention_naive(*turned(given).arguments), attention_naive(*given.arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("codec", CODECS)
def test_native_kernels_refuse_them(codec: str, page_size: int | None) -> None:
    if attention_kernel(codec, torch.float32, CPU, 1, (64, 64)).run is not native.attend:
        pytest.skip("no C++ compiler")
    given = turned(case(codec, length=45, page_size=page_size))
    new = torch.randn(2, 1, given.values.planes[0].shape[1], 1, 64)
    before = [plane.clone() for plane in given.values.planes]
    with pytest.raises(ValueError, match="native kernels take contiguous planes"):
        native.attend(*given.arguments)
    with pytest.raises(ValueError, match="native kernels take contiguous planes"):
        native.append(*new, given.keys, given.values, given.layout)
    for plane, held in zip(given.values.planes, before, strict=True):
        assert torch.equal(plane.view(torch.uint8), held.view(torch.uint8))
    refused = append_kernel(codec, torch.float32, CPU, (64, 64), True)
    assert (refused.run, refused.of_step) == (None, None)
    assert refused.reason == ("native append: the numbers of a token must lie side by side, and those of values do not")


class Wanting(Backend):
    """Attends by the naive twins, to values that it wants with tokens innermost."""

    def __init__(self, takes: bool = True) -> None:
        self.takes, self.seen = takes, set[bool]()

    def serves(self, device: torch.device) -> bool:
        return True

    def attention(self, asked: Asked) -> Kernel:
        traits = {"takes_values_innermost": self.takes, "wants_values_innermost": True}
        run = self.attend if asked.num_queries < MANY else None
        return Kernel("wanting", "for a test", run, **traits)

    def attend(self, query: torch.Tensor, keys: Encoded, values: Encoded, *given: Any) -> Attended:
        assert not any(map(has_tokens_innermost, (*keys.planes, *values.planes[1:])))
        self.seen.add(has_tokens_innermost(values.planes[0]))
        out, lse = attention_naive(query, keys, values, *given)
        return Attended(out.to(query.dtype), lse)


@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:4"])
def test_stores_keep_values_as_the_kernel_that_reads_them_wants(store: str) -> None:
    model, inputs = llama(), prompt()
    with hfkv.patch(model, kv=f"int8+{store}"):
        expected = greedy(model, inputs)
        with registered(Wanting()) as backend:
            assert torch.equal(greedy(model, inputs), expected)
            assert backend.seen == {True}
            cache = KVCache(model, f"int8+{store}")
            feed(cache, 2, 5)
            assert orders(cache) == {(False, False, True, False)}
            of_layers = describe_layers("llama", model.config, f"int8+{store}", torch.float32, CPU).groups[0].uses
            assert [use.kernel for use in of_layers] == ["wanting", "cpu flash", "torch"]
        with registered(Wanting(takes=False)) as backend:
            assert torch.equal(greedy(model, inputs), expected)
            assert backend.seen == {False}


def test_plain_tokens_and_what_lies_beside_latents_never_lie_so() -> None:
    with registered(Wanting()), mock.patch.object(Storage, "values_innermost", True):
        cache = KVCache(llama(), "none")
        feed(cache, 2, 5)
        assert orders(cache) == {(False, False)}
        latents = NAMED["deepseek_v3"]().model
        cache = KVCache(latents, "int8")
        with torch.no_grad():
            latents(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
        assert orders(cache) == {(False,) * 4}


@pytest.mark.pairwise
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("offload", ["", "+offload", "+offload+device_budget:"])
@pytest.mark.parametrize("window", ["", "+window:6+sinks:2"])
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:4", "auto"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.usefixtures("without_native")
def test_a_cache_holds_the_same_bits_and_shows_the_same_tokens(
    codec: str, store: str, window: str, offload: str, num_beams: int
) -> None:
    model, budget = llama(), ("6kB" if "page" in store or window else "40kB") if "budget" in offload else ""
    kv = f"{codec}{window}+{store}{offload}{budget}"
    found = []
    for is_innermost in (False, True):
        with mock.patch.object(Storage, "values_innermost", is_innermost), hfkv.patch(model, kv=kv):
            cache = model.hfkv.new_cache()
            out = greedy(model, prompt(padding=3), past_key_values=cache, num_beams=num_beams)
        assert orders(cache) == {(False, False, is_innermost, False)}
        held_tokens = cache.leaves[0].store.length
        contents = [leaf.contents() for leaf in cache.leaves]
        planes = [plane for held in contents if held for plane in (*(held.slots or ()), *held.tokens)]
        found.append((out, cache.nbytes(), cache.held_bytes(), [plane.view(torch.uint8) for plane in planes]))
    (out, *num_bytes, planes), (other_out, *other_bytes, other_planes) = found
    assert torch.equal(out, other_out)
    allocated, other_allocated = num_bytes[0], other_bytes[0]
    assert num_bytes[1] == other_bytes[1]
    if "page" in store or offload:
        assert allocated == other_allocated
    else:  # room for a multiple of 16 tokens, from which a buffer also grows
        slot_bytes = num_bytes[1] // held_tokens
        assert other_allocated % (16 * slot_bytes) == 0
        assert other_allocated - allocated < (16 + allocated // slot_bytes // 4) * slot_bytes
    for plane, other in zip(planes, other_planes, strict=True):
        assert torch.equal(plane, other)


@pytest.mark.parametrize("kv", ["int8", "int4+paged+page_size:4", "fp8+window:6+sinks:2", "int8+offload"])
def test_a_file_holds_the_same_bytes_and_is_read_by_either(kv: str, tmp_path: Path) -> None:
    path, files = tmp_path / "cache.safetensors", []
    for is_innermost in (False, True):
        with mock.patch.object(Storage, "values_innermost", is_innermost):
            twin = Twin(KVCache(twins.config(), kv), 2)
            twin.append(7, 0)
            twin.append(1, 1)
        save_cache(twin.cache, path, twins.model())
        files.append(path.read_bytes())
        with mock.patch.object(Storage, "values_innermost", not is_innermost):
            loaded = load_cache(path, twins.model())
        assert orders(loaded) != orders(twin.cache)
        save_cache(loaded, path, twins.model())
        files.append(path.read_bytes())
    assert len(set(files)) == 1
