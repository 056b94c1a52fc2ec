"""The native `append`: the codecs' own bytes, where the layout says, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.naive import append_naive
from hfkv.kernels.native.kernels import append, code_of
from hfkv.kernels.native.library import library, why_not
from hfkv.stores.layout import Layout
from tests.kernels.held import garbage, shuffled

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "none")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(
    codecs: tuple[str, str], new: tuple[torch.Tensor, torch.Tensor], layout: Layout, shape: tuple[int, int, int]
) -> None:
    sides = [
        [garbage(codec, (*shape, x.shape[3]), x.dtype, x.device) for codec, x in zip(codecs, new, strict=True)]
        for _ in range(2)
    ]
    append(*new, *sides[0], layout)
    append_naive(*new, *sides[1], layout)
    for one, other in zip(*sides, strict=True):
        assert_same_bytes(one, other)


def assert_same_bytes(one: Encoded, other: Encoded) -> None:
    for plane, expected in zip(one.planes, other.planes, strict=True):
        assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("num_new", "head_dims", "page_size"),
    [
        (1, (128, 128), 0),
        (17, (96, 64), 6),
        (63, (80, 5), 0),
        (1, (256, 128), 64),
        (9, (512, 64), 6),
        (900, (64, 64), 0),
    ],
)
def test_bytes_are_the_codecs_own(
    codec: str, dtype: torch.dtype, num_new: int, head_dims: tuple[int, int], page_size: int
) -> None:
    if code_of(codec, dtype) is None:
        pytest.skip("not its own")
    batch, num_heads = 2, 3
    new = tuple(torch.randn(batch, num_heads, num_new, dim).mul(3).to(dtype) for dim in head_dims)
    new[0][0, 0, 0, 1] = 1000
    if page_size == 0:
        check((codec, codec), new, Layout(5, start=3), (batch, num_heads, 5 + 3 + num_new + 2))  # type: ignore[arg-type]
        return
    spans = ((2, page_size), (0, page_size - 1), (1, page_size - 2))
    table = shuffled(batch, 3 + math.ceil(num_new / page_size))
    check((codec, codec), new, Layout(9, table=table, spans=spans), (table.numel(), num_heads, page_size))  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODECS)
def test_hard_rows_and_strides(codec: str) -> None:
    # [B, n, H, D] in memory, every second number of it: no stride is what it usually is.
    new = torch.randn(2, 40, 2, 256)[..., ::2].transpose(1, 2)
    new[0, 0, 0] = 0
    new[0, 0, 1] = -0.0
    new[0, 0, 2] = 7.013  # a range of nothing, and an offset that bfloat16 rounds
    new[0, 0, 3] = torch.linspace(-1, 1, 128)
    new[0, 0, 4] = 1e-39
    new[0, 0, 5] = 1e-41
    new[0, 0, 6, 3] = 1e30
    new[0, 0, 7] = torch.arange(128) - 63.5  # halves, once divided by the scale
    check((codec, codec), (new, new.flip(2)), Layout(1), (2, 2, 41))
    packed = torch.randn(2, 40, 2, 128).transpose(1, 2)
    check((codec, codec), (packed, packed.flip(2)), Layout(1), (2, 2, 41))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rounding_of_fp8(dtype: torch.dtype) -> None:
    # A row whose scale is 1, with the numbers of float8 and those half way between two of them.
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2))
    new = torch.cat((numbers, -numbers, numbers[:6])).to(dtype).view(1, 1, 2, 256)
    check(("fp8", "fp8"), (new, new), Layout(0), (1, 1, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_what_is_not_finite_stays_in_its_row(codec: str, bad: float) -> None:
    new = torch.randn(1, 1, 3, 64)
    written = []
    for value in (bad, 0.5):
        new[0, 0, 1, 5] = value
        encoded = garbage(codec, (1, 1, 3, 64), new.dtype, new.device)
        append(new, new, encoded, encoded, Layout(0))
        written.append(CODECS[codec].decode(encoded.planes, 64, torch.float32)[0, 0])
    assert not written[0][1].isfinite().any()
    assert torch.equal(written[0][::2], written[1][::2])
    assert written[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_many_random_rows_of_all_magnitudes(codec: str, dtype: torch.dtype) -> None:
    rows = torch.randn(1, 1, 20_000, 64) * torch.exp2(torch.randint(-12, 12, (1, 1, 20_000, 1)))
    rows = rows.to(dtype)
    check((codec, codec), (rows, rows.flip(3)), Layout(0), (1, 1, 20_000))


def test_keys_and_values_may_have_codecs_of_their_own() -> None:
    check(("int8", "int4"), (torch.randn(2, 1, 3, 64), torch.randn(2, 1, 3, 32)), Layout(0), (2, 1, 3))


def test_an_empty_store_is_filled_from_its_first_page() -> None:
    new = torch.randn(1, 1, 20, 64)
    check(("none", "int8"), (new, new), Layout(0, table=torch.tensor([[2, 0, 1]])), (3, 1, 8))


def test_no_tokens_are_no_work() -> None:
    new = torch.randn(1, 1, 0, 64)
    check(("int8", "int8"), (new, new), Layout(3), (1, 1, 3))


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        (Layout(6, start=1), 1),
        (Layout(15, table=torch.tensor([[0, 1]]), spans=((0, 8), (0, 7))), 2),
        (Layout(5, table=torch.tensor([[7]]), spans=((0, 5),)), 2),
    ],
)
def test_what_would_be_written_outside_is_refused(layout: Layout, rows: int) -> None:
    new = torch.randn(1, 1, 2, 64)
    planes = garbage("int8", (rows, 1, 8, 64), new.dtype, new.device)
    before = [plane.clone() for plane in planes.planes]
    with pytest.raises(ValueError, match="2 new tokens find no room"):
        append(new, new, planes, planes, layout)
    for plane, expected in zip(planes.planes, before, strict=True):
        assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))
