"""The CPU kernels against their naive twin, on the same bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.naive import read_naive
from hfkv.kernels.native.kernels import attend
from hfkv.kernels.native.library import library, why_not
from tests.kernels.cases import case, check, cut_short, spoil, windowed

KERNELS = {"decode": decode_attention, "flash": flash_attention, "native": attend}
ALL = ("none", "int8", "int4", "fp8", "int3", "int2")
CODECS = {"decode": ALL[1:], "flash": ALL, "native": ALL}

pytestmark = pytest.mark.parametrize(("kernel", "codec"), [(k, c) for k in KERNELS for c in CODECS[k]])


@pytest.fixture(autouse=True)
def chosen(kernel: str, codec: str) -> None:
    if kernel == "decode" and codec != "fp8" and not is_exact():
        pytest.skip("without exact int8 products no processor is given this kernel")
    if kernel == "native" and library() is None:
        pytest.skip(why_not())


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts are cut in several."""
    cut_short(monkeypatch, stretch=32)


@pytest.mark.pairwise
@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_lengths_groups_and_head_dims(kernel: str, codec: str, length: int, groups: int, head_dim: int) -> None:
    check(KERNELS[kernel], case(codec, length=length, groups=groups, head_dim=head_dim))


SHAPES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 3},
    "ragged": {"batch": 4, "pads": (0, 5, 62, 63)},
    "pages": {"page_size": 16, "batch": 2},
    "odd pages, ragged": {"page_size": 8, "odd_spans": True, "batch": 3, "pads": (0, 30, 7)},
    "softcap": {"softcap": 2.0},
    "sink logits": {"sink_logits": True, "batch": 2, "pads": (0, 63)},
    "other values": {"value_dim": 32},
    "bf16": {"dtype": torch.bfloat16, "batch": 2, "pads": (0, 9)},
    "fp16": {"dtype": torch.float16},
    "one page": {"page_size": 128},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_queries", [1, 5, 63])
def test_shapes(kernel: str, codec: str, shape: str, num_queries: int) -> None:
    if (kernel, codec, shape) == ("native", "none", "fp16"):
        pytest.skip("plain fp16 tokens are not its own")
    check(KERNELS[kernel], case(codec, num_queries=num_queries, **SHAPES[shape]))


@pytest.mark.pairwise
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize(("num_slots", "held_from"), [(0, 0), (0, 11), (4, 2), (4, 50)])
@pytest.mark.parametrize("page_size", [None, 8])
def test_windows(
    kernel: str, codec: str, num_queries: int, size: int, num_slots: int, held_from: int, page_size: int | None
) -> None:
    given = case(codec, batch=3, pads=(0, 3, 13), num_queries=num_queries, page_size=page_size)
    check(KERNELS[kernel], windowed(given, size, sinks=4, num_slots=num_slots, held_from=held_from))


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_masks(kernel: str, codec: str, heads: int, rows: int) -> None:
    given = case(codec, batch=2, num_queries=30, groups=4)
    mask = torch.rand(rows, heads, 30, 60) < 0.3
    mask[:, :, 3] = False
    visibility = replace(given.visibility, first=3, mask=mask)
    check(KERNELS[kernel], replace(given, visibility=visibility))


def test_one_token_takes_nearly_all_the_weight(kernel: str, codec: str) -> None:
    """The others still count: as many digits as float32 has."""
    given = case(codec, length=4000)
    strongest = read_naive(given.keys, given.layout)[:, :, 7].repeat_interleave(4, 1)[:, :, None]
    given.query[...] = 1.5 * strongest
    check(KERNELS[kernel], given)


def test_nan_is_not_lost(kernel: str, codec: str) -> None:
    given = case(codec)
    spoil(given.keys.planes[-1][:, 0, 20])
    out, _ = KERNELS[kernel](*given.arguments)  # type: ignore[arg-type]
    assert out[:, :4].isnan().all()
    assert not out[:, 4:].isnan().any()
