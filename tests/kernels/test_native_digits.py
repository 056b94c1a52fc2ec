"""Native attention where its integers and pairs end: small weights, scales and queries of many sizes, no numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attention_naive
from hfkv.kernels.native.kernels import attend, code_of
from hfkv.kernels.native.library import library, why_not
from hfkv.stores.layout import Layout
from tests.kernels.cases import Case, case, check, spoil

pytestmark = [
    pytest.mark.skipif(library() is None, reason=why_not() or "none"),
    pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "none", "int3", "int2"]),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse_half(codec: str, dtype: torch.dtype) -> None:
    if code_of(codec, dtype) is None:
        pytest.skip("tokens of codec none are fp32 or bf16 there")


def encoded(codec: str, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, scale: float = 1.0) -> Case:
    refuse_half(codec, query.dtype)
    parts = [Encoded(CODECS[codec], CODECS[codec].encode(x), x.shape[-1]) for x in (keys, values)]
    length = keys.shape[2]
    return Case(query, parts[0], parts[1], Layout(length), Visibility(length, (0,)), Scoring(scale))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 3.1e-5)])
def test_small_weights_count_beside_an_attention_sink(codec: str, dtype: torch.dtype, most: float) -> None:
    """8,000 weights of 1e-6: in dims that the sink's value leaves out they are all of the output."""
    if codec in ("int3", "int2"):
        pytest.skip("they have no exact zeros beside other numbers, and their products are those of int8")
    keys = torch.zeros(1, 1, 8001, 64)
    keys[:, :, 77, 0] = 13.8
    values = torch.ones(1, 1, 8001, 64)
    values[:, :, 77] = 0
    query = torch.zeros(1, 4, 1, 64)
    query[..., 0] = 1
    given = encoded(codec, keys.to(dtype), values.to(dtype), query.to(dtype))
    exact = attention_naive(*given.arguments, dtype=torch.float64)[0]
    assert exact.min() > 5e-3
    assert exact.max() < 1e-2
    assert (attend(*given.arguments).out.double() - exact).abs().max() <= most


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_many_sizes_in_a_tile(codec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    sizes = 10 ** torch.linspace(-3, 2, 300)[torch.randperm(300)][None, None, :, None]
    keys, values = (torch.randn(1, 2, 300, 128).mul(sizes).to(dtype) for _ in range(2))
    check(attend, encoded(codec, keys, values, torch.randn(1, 8, 3, 128).to(dtype), 0.05))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_scores_are_equal(codec: str, dtype: torch.dtype) -> None:
    refuse_half(codec, dtype)
    given = case(codec, length=4200, dtype=dtype)
    given.query.zero_()
    check(attend, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [30.0, 1e3, 6e4])
def test_one_number_of_a_query_is_far_beyond_the_others(codec: str, largest: float, dtype: torch.dtype) -> None:
    """Of all keys that number is nothing: what the others are is all of the scores."""
    if CODECS[codec].is_rotated and largest > 100:
        pytest.skip("rotated codes have no exact zeros beside other numbers: scores are of thousands then")
    torch.manual_seed(0)
    keys, values = (torch.randn(1, 1, 200, 64) for _ in range(2))
    keys[..., 5] = 0
    query = torch.randn(1, 4, 2, 64)
    query[..., 5] = largest
    check(attend, encoded(codec, keys.to(dtype), values.to(dtype), query.to(dtype), 0.3))


def test_no_bit_of_a_bf16_query_is_lost(codec: str) -> None:
    if CODECS[codec].is_rotated or codec == "none":
        pytest.skip("a rotated query has more bits than bf16, and of codec none the sums are not exact")
    torch.manual_seed(0)
    keys, values = (torch.randn(1, 1, 200, 64).bfloat16() for _ in range(2))
    query = torch.randn(1, 4, 2, 64)
    query[..., 5] = 100
    given = encoded(codec, keys, values, query.bfloat16(), 0.05)
    exact = attention_naive(*given.arguments, dtype=torch.float64)[1]
    assert (attend(*given.arguments).lse.double() - exact).abs().max() <= 3e-6


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row(codec: str, number: float) -> None:
    given = case(codec, length=200, num_queries=2)
    expected = attend(*given.arguments).out
    given.query[:, 1, 0, 3] = number
    out = attend(*given.arguments).out
    assert out[:, 1, 0].isnan().all()
    out[:, 1, 0] = expected[:, 1, 0]
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("token", [198, 199])
def test_a_value_that_is_none_spoils_whom_it_is_seen_by(codec: str, token: int, dtype: torch.dtype) -> None:
    given = case(codec, length=200, num_queries=2, dtype=dtype)
    spoil(given.values.planes[-1][:, 0, 3 + token])
    out = attend(*given.arguments).out
    assert out[:, :4].isnan()[:, :, 1].all()
    assert not out[:, 4:].isnan().any()
    # One that nobody sees is not read.
    hidden = torch.ones(1, 1, 2, 200, dtype=torch.bool)
    hidden[..., token] = False
    given = replace(given, visibility=replace(given.visibility, mask=hidden))
    assert not attend(*given.arguments).out.isnan().any()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1e30])
def test_values_of_any_size(codec: str, magnitude: float) -> None:
    if codec in ("int3", "int2"):
        magnitude = min(magnitude, 1e4)  # what scales of eight bits have
    torch.manual_seed(0)
    keys, values = (torch.randn(1, 2, 150, 64) for _ in range(2))
    query = torch.randn(1, 8, 1, 64)
    given = encoded(codec, keys, values * magnitude, query)
    exact = attention_naive(*given.arguments, dtype=torch.float64)[0]
    assert ((attend(*given.arguments).out.double() - exact) / magnitude).abs().max() <= 1e-5


@pytest.mark.parametrize("widths", [(5, 3), (72, 40), (64, 192), (130, 64), (1, 1)])
@pytest.mark.parametrize("groups", [1, 3, 7])
def test_odd_widths_and_groups(codec: str, widths: tuple[int, int], groups: int) -> None:
    given = case(codec, length=150, head_dim=widths[0], value_dim=widths[1], groups=groups, num_queries=2)
    check(attend, given)
    check(attend, case(codec, length=90, head_dim=widths[0], groups=groups, page_size=16, dtype=torch.bfloat16))


@pytest.mark.parametrize("kernel", [attend, decode_attention, flash_attention])
@pytest.mark.parametrize("exponent", [-10, -18, -26])
def test_values_whose_rotated_numbers_are_all_the_same_are_not_lost_beside_their_scale(
    codec: str, kernel: Any, exponent: int
) -> None:
    if kernel is decode_attention and codec == "none":
        pytest.skip("it reads codes")
    torch.manual_seed(0)
    values = torch.zeros(1, 1, 150, 64)
    values[..., 0] = 2.0**exponent
    given = encoded(codec, torch.randn(1, 1, 150, 64), values, torch.randn(1, 4, 1, 64), 0.1)
    out = kernel(*given.arguments).out * 2.0**-exponent
    exact = attention_naive(*given.arguments, dtype=torch.float64)[0] * 2.0**-exponent
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=0)
