"""The CPU kernels where their numbers end: small weights, long sums, large rows, other default dtypes, many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfkv.codecs import CODECS, hadamard
from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.stores.layout import Layout
from tests.kernels.cases import case, check

EXACT = pytest.mark.skipif(not is_exact(), reason="without exact int8 products no processor is given this kernel")


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize(("length", "kv_heads"), [(32_768, 1), (65_536, 1), (8192, 8)])
@EXACT
def test_the_tail_beside_an_attention_sink_counts(codec: str, length: int, kv_heads: int) -> None:
    """Weights 2^-22 times the largest: alone nothing, together a hundredth of the output."""
    gap, head_dim = 15.5, 16
    keys = torch.zeros(1, kv_heads, length, head_dim)
    keys[:, :, 0, 0] = gap
    values = torch.ones(1, kv_heads, length, head_dim)
    values[:, :, 0] = 0
    values[:, :, 0, 1] = 1
    query = torch.zeros(1, kv_heads * 4, 1, head_dim)
    query[..., 0] = 1
    parts = [Encoded(CODECS[codec], CODECS[codec].encode(states), head_dim) for states in (keys, values)]
    decoded = [CODECS[codec].decode(part.planes, head_dim, torch.float64) for part in parts]
    scores = (query.double()[:, ::4] @ decoded[0].transpose(2, 3)).softmax(-1)
    expected = (scores @ decoded[1]).repeat_interleave(4, dim=1)
    out, _ = decode_attention(query, *parts, Layout(length), Visibility(length, (0,)), Scoring(1.0))
    assert expected[..., 2].min() > 1e-3
    assert (out - expected).abs().max() <= 3e-5


@EXACT
def test_more_tokens_than_an_int32_sum_may_have() -> None:
    check(decode_attention, case("int8", kv_heads=1, groups=1, length=140_000, head_dim=16))


@pytest.mark.parametrize("codec", ["int8", "int4"])
@EXACT
def test_rows_near_the_limit_of_float16(codec: str) -> None:
    states = torch.full((1, 2, 40, 128), 6000.0 if codec == "int4" else 65_400.0, dtype=torch.float16)
    part = Encoded(CODECS[codec], CODECS[codec].encode(states), 128)
    query = torch.randn(1, 4, 32, 128, dtype=torch.float16) * 1e-3
    out, _ = flash_attention(query, part, part, Layout(40), Visibility(40, (0,)), Scoring(128**-0.5))
    assert out.isfinite().all() if codec == "int4" else not out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@EXACT
def test_int4_under_another_default_dtype(dtype: torch.dtype) -> None:
    given = case("int4")
    expected, _ = decode_attention(*given.arguments)
    hadamard._matrix.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        out, _ = decode_attention(*given.arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kernel", [decode_attention, flash_attention])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@EXACT
def test_many_ragged_rows_go_together(kernel: Any, codec: str) -> None:
    pads = tuple(torch.randint(0, 60, (16,), generator=torch.Generator().manual_seed(0)).tolist())
    check(kernel, case(codec, batch=16, length=63, pads=pads))
    check(kernel, case(codec, batch=16, length=63, pads=pads, num_queries=63))
