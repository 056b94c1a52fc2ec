"""Values whose tokens lie side by side, for the kernels that take either order."""

import pytest
import torch

from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.naive import append_naive
from hfkv.kernels.selftest.inputs import turned
from hfkv.kernels.triton.append import append
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.latent import latent_attention
from hfkv.kernels.triton.prefill import prefill_attention
from hfkv.stores.layout import Layout
from tests.kernels.held import WHOLE, check, contiguous, garbage, odd_spans, paged, shuffled
from tests.kernels.test_triton_decode import BF16, SINGLE, rows


@pytest.mark.pairwise
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize(
    ("codec", "num_queries", "dtype"), [("int8", 2, SINGLE), ("int4", 20, BF16), ("fp8", 20, BF16)]
)
def test_attention_reads_them(
    codec: str, num_queries: int, dtype: torch.dtype, page_size: int, device: torch.device
) -> None:
    length = 90
    k, v = rows(2, 2, 1, length, 64, dtype=dtype, device=device)
    spans = odd_spans(length, page_size) if page_size else ()
    table = shuffled(2, len(spans)) if page_size else None
    keys, values = (
        contiguous(codec, x, spare=7) if table is None else paged(codec, x, table, spans, page_size) for x in (k, v)
    )
    check(
        decode_attention if num_queries < 16 else prefill_attention,
        rows(2, 2, num_queries, 64, dtype=dtype, device=device),
        keys,
        turned(values),
        Layout(length, table=table, spans=spans),
        Visibility(length, (0, 30)),
        Scoring(0.125),
    )


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_latents_attend_with_rotary_keys_that_lie_so(codec: str, device: torch.device) -> None:
    check(
        latent_attention,
        rows(1, 4, 1, 80, device=device),
        contiguous(codec, rows(1, 1, 70, 64, device=device)),
        turned(contiguous(codec, rows(1, 1, 70, 16, device=device))),
        Layout(70),
        Visibility(70, (0,)),
        Scoring(0.125),
        twin=latent_attention_naive,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("codec", WHOLE)
@pytest.mark.parametrize("page_size", [0, 16])
def test_new_tokens_are_written_to_them(codec: str, page_size: int, device: torch.device) -> None:
    new = tuple(rows(2, 2, 2, 19, 96, device=device))
    layout = Layout(5, start=3)
    shape = (2, 2, 48, 96)
    if page_size:
        layout = Layout(5, table=shuffled(2, 3), spans=((0, 5),))
        shape = (6, 2, page_size, 96)
    sides = [[garbage(codec, shape, BF16, device), turned(garbage(codec, shape, BF16, device))] for _ in range(2)]
    append(*new, *sides[0], layout)
    append_naive(*new, *sides[1], layout)
    for one, other in zip(*sides, strict=True):
        for plane, expected in zip(one.planes, other.planes, strict=True):
            assert plane.stride() == expected.stride()
            assert torch.equal(plane.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
