"""`prefill_attention` against its naive twin, for many queries."""

import pytest
import torch

from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.triton.prefill import prefill_attention
from hfkv.stores.layout import Layout
from tests.kernels.held import WHOLE, check, contiguous, odd_spans, paged, shuffled

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32


def rows(*shape: int, dtype: torch.dtype = BF16, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize(
    ("length", "num_queries", "groups", "head_dim", "dtype"),
    [
        (63, 63, 1, 64, BF16),
        (200, 200, 1, 128, HALF),
        (263, 63, 4, 96, SINGLE),
        (100, 33, 3, 256, BF16),
        (521, 40, 8, 64, BF16),
    ],
)
@pytest.mark.parametrize("codec", WHOLE)
def test_chunks_over_what_is_held(
    codec: str, length: int, num_queries: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    k, v = rows(2, 1, 1, length, head_dim, dtype=dtype, device=device)
    check(
        prefill_attention,
        rows(1, groups, num_queries, head_dim, dtype=dtype, device=device),
        contiguous(codec, k, start=5, spare=70),
        contiguous(codec, v, start=5, spare=70),
        Layout(length, start=5),
        Visibility(seen=length, pads=(0,)),
        Scoring(head_dim**-0.5),
    )


@pytest.mark.parametrize("codec", WHOLE)
@pytest.mark.parametrize("page_size", [10, 32, 64])
def test_pages_under_ragged_padding(codec: str, page_size: int, device: torch.device) -> None:
    length, num_queries = 190, 90
    k, v = rows(2, 3, 1, length, 64, device=device)
    # Padding may have left anything behind.
    v[1, :, :130] = float("nan")
    v[2] = float("nan")
    spans = odd_spans(length, page_size)
    table = shuffled(3, len(spans))
    check(
        prefill_attention,
        rows(3, 2, num_queries, 64, device=device),
        paged(codec, k, table, spans, page_size),
        paged(codec, v, table, spans, page_size),
        Layout(length, table=table, spans=spans),
        Visibility(seen=length, pads=(0, 130, length)),
        Scoring(0.125),
    )


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize(
    ("length", "held_from", "num_slots", "sinks", "window"),
    [(300, 0, 0, 0, 40), (300, 0, 0, 5, 40), (184, 120, 4, 4, 50), (184, 120, 4, 0, 1)],
)
def test_windows(
    length: int, held_from: int, num_slots: int, sinks: int, window: int, page_size: int, device: torch.device
) -> None:
    seen, num_queries = 300, 100
    t = torch.arange(seen - num_queries, seen, device=device)
    k, v = rows(2, 2, 1, length, 64, device=device)
    spans = odd_spans(length, page_size) if page_size else ()
    table = shuffled(2, len(spans)) if page_size else None
    check(
        prefill_attention,
        rows(2, 2, num_queries, 64, device=device),
        *(contiguous("int8", x) if table is None else paged("int8", x, table, spans, page_size) for x in (k, v)),
        Layout(length, table=table, spans=spans),
        Visibility(seen, (0, 230), 0, held_from, num_slots, sinks, bounds=(t - window + 1)[None]),
        Scoring(0.125),
    )


def test_a_mask_softcap_and_sink_logits(device: torch.device) -> None:
    k, v = rows(2, 2, 1, 130, 64, device=device)
    mask = torch.rand(2, 1, 70, 110, device=device) < 0.3
    mask[1, :, 40] = False
    scoring = Scoring(0.5, softcap=3.0, sink_logits=torch.tensor([1.0, -2.0], device=device))
    visibility = Visibility(130, (0, 0), first=20, mask=mask)
    for chosen in (scoring, Scoring(0.5)):
        parts = contiguous("fp8", k), contiguous("int4", v)
        check(prefill_attention, rows(2, 2, 70, 64, device=device), *parts, Layout(130), visibility, chosen)
