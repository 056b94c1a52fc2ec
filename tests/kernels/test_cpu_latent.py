"""The CPU kernels for latents against their naive twins, on the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hfkv.codecs import CODECS
from hfkv.kernels.cpu import bf16_matmul
from hfkv.kernels.cpu.expanded import expanded_attention
from hfkv.kernels.cpu.latent import latent_attention
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.merge import Attended
from hfkv.kernels.naive import attention_naive, read_naive
from hfkv.kernels.native.kernels import code_of
from hfkv.kernels.native.latent import attend_latents
from hfkv.kernels.native.library import library, why_not
from hfkv.stores.layout import Layout
from tests.kernels.cases import Case, case, cut_short, spoil, windowed

# Absorbed by torch's operations, absorbed in C++, expanded.
FORMS = ("absorbed", "native", "expanded")
HEADS, NOPE, ROTARY = 4, 24, 16


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts are cut in several."""
    cut_short(monkeypatch, stretch=64)


def latent_case(codec: str, form: str, *, rank: int = 48, **options: Any) -> Case:
    """Latents in place of keys and rotary keys in place of values, queries as the form takes them."""
    given = case(codec, kv_heads=1, groups=HEADS, head_dim=rank, value_dim=ROTARY, **options)
    width = (NOPE if form == "expanded" else rank) + ROTARY
    query = torch.randn(*given.query.shape[:3], width, dtype=given.query.dtype) * 2
    return replace(given, query=query, scoring=replace(given.scoring, scale=width**-0.5))


def expansion(rank: int, dtype: torch.dtype, value_dim: int = 20) -> Callable[..., Any]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(HEADS * (NOPE + value_dim), rank, generator=generator).to(dtype) * rank**-0.5

    def expand(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = F.linear(latents, weight.to(latents.dtype))[:, 0].unflatten(2, (HEADS, -1)).transpose(1, 2)
        nope, value = heads.split((NOPE, value_dim), dim=-1)
        return nope, value

    return expand


def expanded_naive(given: Case, expand: Callable[..., Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    latents, rotary = (read_naive(part, given.layout, dtype) for part in (given.keys, given.values))
    nope, value = expand(latents)
    key = torch.cat((nope, rotary.expand(-1, HEADS, -1, -1)), dim=-1)
    parts = [Encoded(CODECS["none"], (states,), states.shape[3]) for states in (key, value)]
    layout = Layout(given.layout.length)
    return attention_naive(given.query, *parts, layout, given.visibility, given.scoring, dtype)


def absorbed(given: Case, form: str) -> Attended:
    """Attention of absorbed queries in one of two forms; the native one is skipped where it does not take them."""
    if form == "absorbed":
        return latent_attention(*given.arguments)
    if library() is None:
        pytest.skip(why_not())
    if code_of(given.keys.codec.name, given.query.dtype) is None:
        pytest.skip("tokens of codec none are fp32 or bf16 there")
    return attend_latents(*given.arguments)


def check(given: Case, form: str, value_dim: int = 20) -> None:
    """The error against the twin in float64 is at most twice that of the twin in the query's dtype, and 1e-5."""
    dtype = given.query.dtype
    if form != "expanded":
        got = absorbed(given, form)
        exact, plain = (latent_attention_naive(*given.arguments, dtype=of) for of in (torch.float64, dtype))
    else:
        expand = expansion(given.keys.head_dim, dtype, value_dim)
        got = expanded_attention(*given.arguments, expand=expand)
        exact, plain = (expanded_naive(given, expand, of) for of in (torch.float64, dtype))
    out, lse = got
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out[lse == -torch.inf], torch.zeros_like(out[lse == -torch.inf]))
    for ours, theirs, expected in zip(got, plain, exact, strict=True):
        assert ours.shape == expected.shape
        assert torch.equal(ours.isinf(), expected.isinf())
        finite = ~expected.isinf()
        error, allowed = ((part.double() - expected)[finite] for part in (ours, theirs))
        assert not error.isnan().any()
        if finite.any():
            assert error.abs().max() <= 2 * allowed.abs().max() + 1e-5


ALL = pytest.mark.parametrize(("form", "codec"), [(form, codec) for form in FORMS for codec in CODECS])


@pytest.mark.pairwise
@ALL
@pytest.mark.parametrize("length", [0, 1, 63, 300])
@pytest.mark.parametrize("rank", [32, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lengths_ranks_and_dtypes(form: str, codec: str, length: int, rank: int, dtype: torch.dtype) -> None:
    check(latent_case(codec, form, length=length, rank=rank, dtype=dtype), form)


@pytest.mark.pairwise
@ALL
@pytest.mark.parametrize("num_queries", [1, 2, 17, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries(form: str, codec: str, num_queries: int, dtype: torch.dtype) -> None:
    check(latent_case(codec, form, num_queries=num_queries, length=300, dtype=dtype), form)


SHAPES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 3},
    "ragged": {"batch": 4, "pads": (0, 5, 62, 63)},
    "pages": {"page_size": 16, "batch": 2},
    "odd pages, ragged": {"page_size": 8, "odd_spans": True, "batch": 3, "pads": (0, 30, 7)},
    "softcap": {"softcap": 2.0},
    "sink logits": {"sink_logits": True, "batch": 2, "pads": (0, 63)},
    "one page": {"page_size": 128},
    "many ragged rows": {"batch": 9, "pads": (3, 40, 0, 17, 60, 9, 9, 22, 63)},
}


@pytest.mark.pairwise
@ALL
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_queries", [1, 5, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(form: str, codec: str, shape: str, num_queries: int, dtype: torch.dtype) -> None:
    check(latent_case(codec, form, num_queries=num_queries, dtype=dtype, **SHAPES[shape]), form)


@pytest.mark.pairwise
@ALL
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize(("num_slots", "held_from"), [(0, 0), (0, 11), (4, 2), (4, 50)])
@pytest.mark.parametrize("page_size", [None, 8])
def test_windows(
    form: str, codec: str, num_queries: int, size: int, num_slots: int, held_from: int, page_size: int | None
) -> None:
    dtype = torch.bfloat16 if size == 7 else torch.float32
    options = {"num_queries": num_queries, "page_size": page_size, "dtype": dtype}
    given = latent_case(codec, form, batch=3, pads=(0, 3, 13), **options)
    check(windowed(given, size, sinks=4, num_slots=num_slots, held_from=held_from), form)


@pytest.mark.pairwise
@ALL
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(form: str, codec: str, heads: int, rows: int, dtype: torch.dtype) -> None:
    given = latent_case(codec, form, batch=2, num_queries=30, dtype=dtype)
    mask = torch.rand(rows, heads, 30, 60) < 0.3
    mask[:, :, 3] = False
    check(replace(given, visibility=replace(given.visibility, first=3, mask=mask)), form)


@pytest.mark.parametrize("value_dim", [8, NOPE, NOPE + ROTARY, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_widths_of_values(value_dim: int, softcap: float | None) -> None:
    check(latent_case("none", "expanded", num_queries=63, softcap=softcap), "expanded", value_dim)


@ALL
def test_what_padding_holds_is_not_looked_at(form: str, codec: str) -> None:
    given = latent_case(codec, form, batch=1, pads=(20,), num_queries=50)
    for plane in (*given.keys.planes, *given.values.planes):
        if plane.dtype.is_floating_point:
            plane[:, :, :23] = torch.nan
    check(given, form)


@ALL
def test_nan_is_not_lost(form: str, codec: str) -> None:
    given = latent_case(codec, form, batch=2)
    spoil(given.keys.planes[-1][0, :, 20])
    if form == "expanded":
        out, _ = expanded_attention(*given.arguments, expand=expansion(48, torch.float32))
    else:
        out, _ = absorbed(given, form)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize(("num_queries", "pad"), [(200, 0), (200, 130), (7, 0)])
def test_a_token_is_expanded_once(num_queries: int, pad: int) -> None:
    """However many tiles of queries see it, and not at all where none does."""
    given = latent_case("int8", "expanded", num_queries=num_queries, length=200, pads=(pad,))
    expand, counts = expansion(48, torch.float32), []

    def counted(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(latents.shape[2])
        return expand(latents)

    expanded_attention(*given.arguments, expand=counted)
    assert sum(counts) == 200 - pad


@pytest.mark.parametrize("form", FORMS[:2])
def test_one_token_takes_nearly_all_the_weight(form: str) -> None:
    """The others still count: scores are not rounded to the query's bfloat16."""
    given = latent_case("none", "absorbed", length=4000, dtype=torch.bfloat16)
    strongest = torch.cat([read_naive(part, given.layout)[:, :, 7] for part in (given.keys, given.values)], dim=-1)
    given.query[...] = 2 * strongest
    _, lse = absorbed(given, form)
    _, exact = latent_attention_naive(*given.arguments, dtype=torch.float64)
    assert (lse - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_queries", [1, 40])
def test_a_processor_without_exact_products(codec: str, num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bf16_matmul", "int8_matmul"):
        monkeypatch.setattr(f"hfkv.kernels.cpu.{module}.is_exact", lambda: False)
    check(latent_case(codec, "absorbed", num_queries=num_queries, dtype=torch.bfloat16), "absorbed")


@pytest.mark.skipif(not bf16_matmul.is_exact(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (1, 300, 16), (3, 64, 129)])
@pytest.mark.parametrize("inner", [1, 16, 200, 512])
def test_bf16_products(shape: tuple[int, int, int], inner: int) -> None:
    count, n, m = shape
    torch.manual_seed(0)
    # Strided, as held tokens are.
    a = torch.randn(count, n + 5, inner).bfloat16()[:, 2 : n + 2]
    b = torch.randn(count, m, inner).bfloat16()
    expected = b.double() @ a.double().transpose(1, 2)
    bound = b.double().abs() @ a.double().abs().transpose(1, 2)
    error = (bf16_matmul.bf16_products(a, b) - expected).abs()
    assert (error <= 2.0**-17 * expected.abs() + inner * 2.0**-24 * bound).all()
