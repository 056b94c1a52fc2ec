"""Kernels of a CPU on keys of one codec and values of another, against their naive twins."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hfkv.codecs import CODECS, Codecs
from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.dispatch import append_kernel, attention_kernel, latent_kernel
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native.kernels import append, attend
from hfkv.kernels.native.library import library, why_not
from hfkv.stores.layout import Layout
from tests.kernels.cases import case, check, cut_short, windowed
from tests.kernels.held import garbage
from tests.kernels.test_cpu_latent import check as check_latent
from tests.kernels.test_cpu_latent import latent_case

CPU = torch.device("cpu")
PAIRS = [f"k:{key}+v:{value}" for key, value in itertools.permutations(CODECS, 2)]
KERNELS = {"decode": decode_attention, "flash": flash_attention, "native": attend}
SHAPES: dict[str, dict[str, Any]] = {
    "one row": {"groups": 1, "length": 300},
    "half": {"batch": 2, "length": 150, "pads": (0, 40), "dtype": torch.bfloat16},
    "float16": {"length": 150, "dtype": torch.float16},
    "wide values": {"length": 150, "head_dim": 24, "value_dim": 96, "softcap": 2.0},
    "pages": {"batch": 2, "page_size": 8, "odd_spans": True, "sink_logits": True, "dtype": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts are cut in several."""
    cut_short(monkeypatch, stretch=64)


def skip_what_is_not_here(kernel: str, pair: str, dtype: torch.dtype) -> None:
    if kernel == "decode" and "int" in pair and not is_exact():
        pytest.skip("without exact int8 products no processor is given this kernel")
    if kernel == "native" and library() is None:
        pytest.skip(why_not())
    if kernel == "native" and "none" in pair and dtype == torch.float16:
        pytest.skip("plain fp16 tokens are not its own")


@pytest.mark.pairwise
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_queries", [1, 5])
def test_attention(pair: str, kernel: str, shape: str, num_queries: int) -> None:
    skip_what_is_not_here(kernel, pair, SHAPES[shape].get("dtype", torch.float32))
    check(KERNELS[kernel], case(pair, num_queries=num_queries, **SHAPES[shape]))


@pytest.mark.pairwise
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows(pair: str, kernel: str, dtype: torch.dtype) -> None:
    skip_what_is_not_here(kernel, pair, dtype)
    given = case(pair, batch=3, pads=(0, 3, 13), num_queries=2, page_size=8, dtype=dtype)
    check(KERNELS[kernel], windowed(given, 40, sinks=4, num_slots=4, held_from=50))


@pytest.mark.pairwise
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("form", ["absorbed", "native", "expanded"])
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents(pair: str, form: str, num_queries: int, dtype: torch.dtype) -> None:
    """Rotary keys beside latents, by a codec of their own."""
    check_latent(latent_case(pair, form, num_queries=num_queries, length=150, batch=2, dtype=dtype), form)


@pytest.mark.skipif(library() is None, reason=why_not() or "none")
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("pair", PAIRS)
def test_native_append(pair: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """To the bits of both codecs; plain tokens stay in their dtype, whatever that of the others is."""
    codecs = Codecs.named(pair)
    new = [torch.randn(2, 3, 5, 48).to(dtype) for dtype in dtypes]
    sides = ((codecs.key, new[0]), (codecs.value, new[1]))
    ours, theirs = ([garbage(codec.name, (2, 3, 9, 48), x.dtype, CPU) for codec, x in sides] for _ in range(2))
    append(*new, *ours, Layout(2, start=1))
    append_naive(*new, *theirs, Layout(2, start=1))
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, _bytes(one), _bytes(other)))


def _bytes(encoded: Encoded) -> list[torch.Tensor]:
    return [plane.view(torch.uint8) for plane in encoded.planes]


@pytest.mark.skipif(not is_exact(), reason="without exact int8 products tokens are decoded")
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_has_a_kernel_of_its_own(pair: str) -> None:
    name = "native" if library() is not None else "cpu"
    asked = pair, torch.bfloat16, CPU
    assert attention_kernel(*asked, 1, (64, 64)).name == f"{name} decode"
    assert attention_kernel(*asked, 64, (64, 64)).name == "cpu flash"
    assert latent_kernel(*asked, 1, (64, 16)).name == f"{name} latent"
    assert append_kernel(*asked, (64, 64)).name == ("native append" if library() is not None else "torch")
