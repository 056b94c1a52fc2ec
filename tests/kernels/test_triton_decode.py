"""`decode_attention` against its naive twin, for a few queries."""

import dataclasses

import pytest
import torch
from torch.library import opcheck

from hfkv.codecs import CODECS
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attention_naive
from hfkv.kernels.triton.attention import _attention_kernel
from hfkv.kernels.triton.decode import decode_attention
from hfkv.stores.layout import Layout
from tests.kernels.held import WHOLE, check, contiguous, odd_spans, paged, shuffled, sparse, worst

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32


def rows(*shape: int, dtype: torch.dtype = BF16, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize(
    ("length", "groups", "head_dim", "num_queries", "dtype"),
    [
        (1, 1, 64, 1, BF16),
        (63, 4, 128, 1, HALF),
        (200, 8, 96, 1, BF16),
        (200, 1, 256, 3, SINGLE),
        (63, 8, 64, 16, BF16),
        (521, 4, 80, 2, SINGLE),
    ],
)
@pytest.mark.parametrize("codec", WHOLE)
def test_shapes(
    codec: str, length: int, groups: int, head_dim: int, num_queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    k, v = rows(2, 2, 1, length, head_dim, dtype=dtype, device=device)
    check(
        decode_attention,
        rows(2, groups, min(num_queries, length), head_dim, dtype=dtype, device=device),
        contiguous(codec, k, start=3, spare=70),
        contiguous(codec, v, start=3, spare=70),
        Layout(length, start=3),
        Visibility(seen=length, pads=(0, 0)),
        Scoring(head_dim**-0.5),
        num_splits=2 if num_queries > 1 else None,
    )


@pytest.mark.parametrize("codec", WHOLE)
@pytest.mark.parametrize("page_size", [6, 16, 64, 128])
def test_pages_in_any_order_with_spans_of_any_kind(codec: str, page_size: int, device: torch.device) -> None:
    length = 203
    k, v = rows(2, 2, 2, length, 64, device=device)
    spans = odd_spans(length, page_size)
    table = shuffled(2, len(spans) + 1)
    check(
        decode_attention,
        rows(2, 8, 1, 64, device=device),
        paged(codec, k, table, spans, page_size),
        paged(codec, v, table, spans, page_size),
        Layout(length, table=table, spans=spans),
        Visibility(seen=length, pads=(0, 77)),
        Scoring(0.125),
        num_splits=2,
    )


@pytest.mark.parametrize("codecs", [("int4", "none"), ("none", "int4"), ("fp8", "int8")])
def test_keys_and_values_of_their_own_codecs_and_widths(codecs: tuple[str, str], device: torch.device) -> None:
    check(
        decode_attention,
        rows(1, 4, 2, 96, device=device),
        contiguous(codecs[0], rows(1, 1, 100, 96, device=device)),
        contiguous(codecs[1], rows(1, 1, 100, 40, device=device)),
        Layout(100),
        Visibility(seen=100, pads=(0,)),
        Scoring(0.1),
    )


# Rows: one without padding, one with some, and one of nothing but padding.
SEEN, QUERIES = 150, 3
T = torch.arange(SEEN - QUERIES, SEEN)
VISIBILITIES = {
    "ragged": (SEEN, Visibility(SEEN, (0, 41, SEEN))),
    "first": (SEEN, Visibility(SEEN, (0, 41, SEEN), first=70)),
    "held from": (90, Visibility(SEEN, (0, 70, SEEN), held_from=60)),
    "bounds": (SEEN, Visibility(SEEN, (0, 120, SEEN), bounds=(T - 30)[None])),
    "bounds of each row": (SEEN, Visibility(SEEN, (0, 41, SEEN), bounds=torch.stack((T - 30, T + 1, T - 149)))),
    "slots": (94, Visibility(SEEN, (0, 41, SEEN), held_from=60, num_slots=4, sinks=4, bounds=(T - 50)[None])),
    "slots partly filled": (44, Visibility(SEEN, (0, 108, SEEN), held_from=110, num_slots=4, sinks=4)),
    "sinks and summaries": (96, Visibility(SEEN, (0, 41, SEEN), held_from=60, num_slots=6, sinks=4, first=2)),
    "sinks among the newest": (SEEN, Visibility(SEEN, (0, 41, SEEN), sinks=5, bounds=(T - 20)[None])),
    "some sinks in slots": (54, Visibility(SEEN, (0, 98, SEEN), held_from=100, num_slots=4, sinks=4, bounds=T[None])),
    "mask": (SEEN, Visibility(SEEN, (0, 0, 0), mask=torch.rand(3, 4, QUERIES, SEEN) < 0.3)),
    "mask for all": (SEEN, Visibility(SEEN, (0, 0, 0), first=9, mask=torch.rand(1, 1, QUERIES, SEEN - 9) < 0.05)),
}


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
    keys, values = (
        contiguous("int8", x) if table is None else paged("int8", x, table, spans, page_size) for x in (k, v)
    )
    query = rows(3, 4, QUERIES, 64, device=device)
    check(decode_attention, query, keys, values, layout, visibility, Scoring(0.125), num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 3, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_scoring(num_splits: int, softcap: float | None, with_sinks: bool, device: torch.device) -> None:
    k, v = rows(2, 2, 1, 333, 64, device=device)
    sinks = torch.tensor([1.5, -40.0, 20.0, 0.0], dtype=BF16, device=device) if with_sinks else None
    check(
        decode_attention,
        rows(2, 4, 1, 64, device=device),
        contiguous("int4", k),
        contiguous("int4", v),
        Layout(333),
        Visibility(seen=333, pads=(333, 100)),
        Scoring(0.5, softcap=softcap, sink_logits=sinks),
        num_splits=num_splits,
    )


def test_large_scores_and_small_values_keep_their_precision(device: torch.device) -> None:
    # float16 has no numbers below 6e-8: weights times scales would be lost.
    k, v = rows(2, 1, 1, 300, 64, dtype=HALF, device=device)
    for codec in WHOLE:
        check(
            decode_attention,
            rows(1, 2, 1, 64, dtype=HALF, device=device),
            contiguous(codec, 20 * k),
            contiguous(codec, v / 1000),
            Layout(300),
            Visibility(seen=300, pads=(0,)),
            Scoring(0.5),
        )


def test_a_query_that_is_a_view(device: torch.device) -> None:
    query = rows(2, 3, 4, 192, device=device)[..., 64:128].transpose(1, 2)
    k = rows(2, 1, 50, 64, device=device)
    arguments = (contiguous("int8", k), contiguous("int8", k), Layout(50), Visibility(50, (0, 5)), Scoring(0.125))
    check(decode_attention, query, *arguments)


@pytest.mark.parametrize("page_size", [0, 8])
def test_one_set_of_inputs_serves_every_step(page_size: int, device: torch.device) -> None:
    steps, window = (70, 71, 72, 90), 60
    k, v = rows(2, 2, 1, steps[-1], 64, device=device)
    table = shuffled(2, 13) if page_size else None
    scoring = Scoring(0.125)

    def at(seen: int) -> tuple[Layout, Visibility]:
        spans = odd_spans(seen, page_size) if page_size else ()
        bounds = torch.tensor([[seen - window]], device=device)
        mask = torch.rand(2, 1, 1, seen, device=device) < 0.5 if seen > 80 else torch.ones(2, 1, 1, seen) > 0
        layout = Layout(seen, table=None if table is None else table[:, : len(spans)], spans=spans)
        return layout, Visibility(seen, (0, seen - 7), bounds=bounds, mask=mask.to(device))

    for with_mask in (False, True):
        inputs = None
        for seen in steps:
            layout, visibility = at(seen)
            visibility = dataclasses.replace(visibility, **({"bounds": None} if with_mask else {"mask": None}))
            if inputs is None:
                inputs = DeviceInputs.allocate(layout, visibility, device, columns=13, tokens=steps[-1])
            inputs.update(layout, visibility)
            parts = [
                contiguous("int8", x[:, :, :seen], spare=steps[-1] - seen)
                if table is None
                else paged("int8", x[:, :, :seen], table, layout.spans, page_size)
                for x in (k, v)
            ]
            query = rows(2, 2, 1, 64, device=device)
            check(decode_attention, query, *parts, layout, visibility, scoring, inputs=inputs)


@pytest.mark.parametrize("is_paged", [False, True])
def test_planes_larger_than_32_bits_count(is_paged: bool, device: torch.device) -> None:
    k = rows(1, 1, 16, 64, dtype=SINGLE, device=device)
    data, scale = CODECS["int8"].encode(k)
    if is_paged:
        plane = sparse((40_001, 1, 16, 64), (65_536, 64, 64, 1), device)
        scales = torch.empty(40_001, 1, 16, 1, dtype=torch.bfloat16, device=device)
        plane[40_000], scales[40_000] = data[0], scale[0]
        layout = Layout(16, table=torch.tensor([[40_000]]), spans=((0, 16),))
    else:
        plane = sparse((1, 1, 40_016, 64), (1, 1, 65_536, 1), device)
        scales = torch.empty(1, 1, 40_016, 1, dtype=torch.bfloat16, device=device)
        plane[:, :, 40_000:], scales[:, :, 40_000:] = data, scale
        layout = Layout(16, start=40_000)
    far, query = Encoded(CODECS["int8"], (plane, scales), 64), rows(1, 1, 1, 64, dtype=SINGLE, device=device)
    out, _ = decode_attention(query, far, far, layout, Visibility(16, (0,)), Scoring(0.125))
    near = Encoded(CODECS["int8"], (data, scale), 64)
    expected, _ = attention_naive(query, near, near, Layout(16), Visibility(16, (0,)), Scoring(0.125))
    assert worst(out, expected.double()) < 1e-5


def test_no_queries_are_no_work(device: torch.device) -> None:
    k = contiguous("int8", rows(1, 1, 8, 64, device=device))
    out, lse = decode_attention(k.planes[1].new_empty(1, 2, 0, 64), k, k, Layout(8), Visibility(8, (0,)), Scoring(1.0))
    assert out.shape == (1, 2, 0, 64)
    assert lse.shape == (1, 2, 0)


def test_what_cannot_be_is_refused(device: torch.device) -> None:
    k = contiguous("int8", rows(2, 2, 8, 64, device=device))
    query, layout, visibility = rows(2, 4, 1, 64, device=device), Layout(8), Visibility(8, (0, 0))
    for wrong, message in (
        ((query[:, :3], k, k, layout, visibility, Scoring(1.0)), "do not go with 2 kv heads"),
        ((query[..., :32], k, k, layout, visibility, Scoring(1.0)), "of 64 dimensions"),
        ((query, k, k, layout, Visibility(8, (0,)), Scoring(1.0)), "1 rows"),
        ((query, k, k, layout, visibility, Scoring(1.0, weights=True)), "attention weights"),
        ((query, k, k, layout, visibility, Scoring(1.0, dropout=0.1)), "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*wrong)
    with pytest.raises(ValueError, match="at most 128"):
        decode_attention(query, k, k, layout, visibility, Scoring(1.0), num_splits=129)
    strided = Encoded(CODECS["int8"], (k.planes[0].mT.contiguous().mT, k.planes[1]), 64)
    with pytest.raises(ValueError, match="side by side"):
        decode_attention(query, strided, k, layout, visibility, Scoring(1.0))
    inputs = DeviceInputs.allocate(layout, Visibility(8, (0,)), device)
    with pytest.raises(ValueError, match="inputs for 1 rows"):
        decode_attention(query, k, k, layout, visibility, Scoring(1.0), inputs=inputs)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    keys, values = (contiguous("int8", x) for x in rows(2, 2, 1, 300, 64, device=device))
    query, scoring = rows(2, 4, 1, 64, device=device), Scoring(0.125)

    def at(seen: int) -> tuple[Layout, Visibility]:
        return Layout(seen), Visibility(seen, (0, seen // 2))

    inputs = DeviceInputs.allocate(*at(10), device)
    decode_attention(query, keys, values, *at(10), scoring, inputs=inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode_attention(query, keys, values, *at(10), scoring, inputs=inputs)
        with pytest.raises(RuntimeError, match="allocate DeviceInputs"):
            decode_attention(query, keys, values, *at(11), scoring)
    for seen in (1, 77, 300):
        inputs.update(*at(seen))
        graph.replay()
        expected, _ = attention_naive(query, keys, values, *at(seen), scoring, torch.float64)
        assert worst(out, expected) < 0.02


@pytest.mark.gpu
def test_lengths_do_not_compile_again() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    compiled = []
    for length in (64, 65, 16, 1, 200, 1000):
        k = contiguous("int8", rows(1, 1, length, 64, device=device), spare=length % 7)
        arguments = (k, k, Layout(length), Visibility(length, (0,)), Scoring(0.125))
        decode_attention(rows(1, 1, 1, 64, device=device), *arguments, num_splits=1 + length % 5)
        compiled.append(len(_attention_kernel.device_caches[device.index][0]))
    # One kernel that writes the output, and one that writes parts of it.
    assert compiled[-1] - compiled[0] <= 1


@pytest.mark.filterwarnings("ignore")
def test_the_operator_keeps_torchs_contract(device: torch.device) -> None:
    k = contiguous("int4", rows(1, 1, 20, 64, device=device))
    inputs = DeviceInputs.allocate(Layout(20), Visibility(20, (0,)), device)
    query = rows(1, 2, 1, 64, device=device)
    planes = (list(k.planes), list(k.planes), "int4", "int4", 64)
    for num_splits in (1, 2):
        arguments = (
            query,
            *planes,
            inputs.meta,
            0,
            None,
            None,
            None,
            0.125,
            None,
            20,
            num_splits,
            inputs.counters,
            False,
        )
        opcheck(torch.ops.hfkv.attention.default, arguments)
