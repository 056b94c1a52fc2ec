"""`decode_attention` in integers: int8 and int4 whose values lie transposed, against its naive twin."""

import dataclasses

import pytest
import torch

from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attention_naive
from hfkv.kernels.triton import operator
from hfkv.kernels.triton.decode import decode_attention
from hfkv.stores.layout import Layout
from tests.kernels.held import check, contiguous, odd_spans, paged, shuffled, transposed, worst
from tests.kernels.test_triton_decode import VISIBILITIES, rows

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def only_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here passes by the kernel of floats."""
    monkeypatch.setattr(operator, "_attention_kernel", None)


def aligned(codec: str, tokens: torch.Tensor, start: int = 0) -> Encoded:
    """Contiguous planes with room for a multiple of 16 tokens."""
    return contiguous(codec, tokens, start=start, spare=16 - (start + tokens.shape[2]) % 16)


@pytest.mark.parametrize(
    ("length", "groups", "head_dim", "num_queries", "dtype"),
    [
        (1, 1, 64, 1, BF16),
        (600, 4, 128, 1, HALF),
        (420, 8, 96, 1, BF16),
        (300, 1, 256, 3, BF16),
        (280, 8, 64, 7, HALF),
        (700, 5, 80, 2, BF16),
    ],
)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_shapes(
    codec: str, length: int, groups: int, head_dim: int, num_queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    k, v = rows(2, 2, 1, length, head_dim, dtype=dtype, device=device)
    check(
        decode_attention,
        rows(2, groups, min(num_queries, length), head_dim, dtype=dtype, device=device),
        aligned(codec, k, start=3),
        transposed(aligned(codec, v, start=3)),
        Layout(length, start=3),
        Visibility(seen=length, pads=(0, 0)),
        Scoring(head_dim**-0.5),
        num_splits=2 if num_queries > 1 else None,
    )


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("page_size", [16, 64, 128, 512])
def test_pages_in_any_order_with_spans_of_any_kind(codec: str, page_size: int, device: torch.device) -> None:
    length = 1100
    k, v = rows(2, 2, 2, length, 64, device=device)
    spans = odd_spans(length, page_size)
    table = shuffled(2, len(spans) + 1)
    check(
        decode_attention,
        rows(2, 8, 1, 64, device=device),
        paged(codec, k, table, spans, page_size),
        transposed(paged(codec, v, table, spans, page_size)),
        Layout(length, table=table, spans=spans),
        Visibility(seen=length, pads=(0, 377)),
        Scoring(0.125),
        num_splits=2,
    )


@pytest.mark.parametrize("codecs", [("int4", "int8"), ("int8", "int4")])
def test_keys_and_values_of_their_own_codecs_and_widths(codecs: tuple[str, str], device: torch.device) -> None:
    check(
        decode_attention,
        rows(1, 4, 2, 96, device=device),
        aligned(codecs[0], rows(1, 1, 300, 96, device=device)),
        transposed(aligned(codecs[1], rows(1, 1, 300, 40, device=device))),
        Layout(300),
        Visibility(seen=300, pads=(0,)),
        Scoring(0.1),
    )


@pytest.mark.parametrize("name", VISIBILITIES)
@pytest.mark.parametrize("page_size", [0, 16])
def test_visibility(name: str, page_size: int, device: torch.device) -> None:
    length, visibility = VISIBILITIES[name]
    tensors = {part: getattr(visibility, part) for part in ("bounds", "mask")}
    moved = {part: tensor.to(device) for part, tensor in tensors.items() if tensor is not None}
    visibility = dataclasses.replace(visibility, **moved)
    k, v = rows(2, 3, 2, length, 64, device=device)
    if "mask" in moved:
        # What nobody of a kv head's heads sees may hold anything.
        v[:, :, visibility.first + 3] = float("nan")
        moved["mask"][..., 3] = False
    elif name == "ragged":
        v[1, :, :41] = float("nan")
        v[2] = float("nan")
    spans = odd_spans(length, page_size) if page_size else ()
    table = shuffled(3, len(spans)) if page_size else None
    layout = Layout(length, table=table, spans=spans)
    keys, values = (aligned("int8", x) if table is None else paged("int8", x, table, spans, page_size) for x in (k, v))
    query = rows(3, 4, 3, 64, device=device)
    check(decode_attention, query, keys, transposed(values), layout, visibility, Scoring(0.125), num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_scoring(num_splits: int, softcap: float | None, with_sinks: bool, device: torch.device) -> None:
    k, v = rows(2, 2, 1, 900, 64, device=device)
    sinks = torch.tensor([1.5, -40.0, 20.0, 0.0], dtype=BF16, device=device) if with_sinks else None
    check(
        decode_attention,
        rows(2, 4, 1, 64, device=device),
        aligned("int4", k),
        transposed(aligned("int4", v)),
        Layout(900),
        Visibility(seen=900, pads=(900, 100)),
        Scoring(0.5, softcap=softcap, sink_logits=sinks),
        num_splits=num_splits,
    )


def test_queries_without_digits_and_tokens_without_numbers_are_nan(device: torch.device) -> None:
    k, v = rows(2, 1, 1, 700, 64, device=device)
    query = rows(1, 4, 1, 64, device=device)
    query[0, 1, 0, 5], query[0, 2, 0, 6] = float("nan"), float("inf")
    arguments = Layout(700), Visibility(700, (0,)), Scoring(0.125)
    out, _ = decode_attention(query, aligned("int8", k), transposed(aligned("int8", v)), *arguments)
    assert out.isnan().all(-1)[0, :, 0].tolist() == [False, True, True, False]
    assert not out[:, ::3].isnan().any()
    query[0, 1:3] = 0.0
    for codec in ("int8", "int4"):
        for part in (k, v):
            spoiled = part.clone()
            spoiled[0, 0, 300, 7] = float("nan")
            keys, values = (aligned(codec, spoiled if part is x else x) for x in (k, v))
            assert decode_attention(query, keys, transposed(values), *arguments)[0].isnan().all()
