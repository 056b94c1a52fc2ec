"""`decode_attention` in digits: codes whose values lie transposed, against its naive twin."""

import dataclasses
from unittest import mock

import pytest
import torch

from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.naive import attention_naive
from hfkv.kernels.selftest.inputs import turned
from hfkv.kernels.triton import call, operator
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.digits.call import CODECS
from hfkv.kernels.triton.digits.numbers import NIBBLES
from hfkv.kernels.triton.tiling import Tiling
from hfkv.stores.layout import Layout
from tests.kernels.held import check, contiguous, odd_spans, paged, shuffled, worst
from tests.kernels.test_triton_decode import VISIBILITIES, rows

SMALL = Tiling(8, 32, 4, 3)
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def only_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here passes by the kernel of floats."""
    monkeypatch.setattr(operator, "_attention_kernel", None)


def aligned(codec: str, tokens: torch.Tensor, start: int = 0) -> Encoded:
    """Contiguous planes with room for a multiple of 16 tokens."""
    return contiguous(codec, tokens, start=start, spare=16 - (start + tokens.shape[2]) % 16)


SHAPES = [(1, 1, 64, 1), (300, 4, 128, 1), (270, 8, 96, 1), (150, 1, 256, 3), (140, 8, 64, 7), (140, 5, 80, 2)]
KINDS = [("int8", BF16), ("int4", HALF), ("fp8", BF16), ("int4", BF16), ("int8", HALF), ("fp8", HALF)]
OF_BITS = [("int3", BF16, 150, 4, 128, 1), ("int2", HALF, 150, 5, 24, 2)]


@pytest.mark.parametrize(
    ("codec", "dtype", "length", "groups", "head_dim", "num_queries"),
    [
        pytest.param(*kind, *shape, marks=[] if place == at else [pytest.mark.slow])
        for at, shape in enumerate(SHAPES)
        for place, kind in enumerate(KINDS)
    ]
    + OF_BITS,
)
def test_shapes(
    codec: str, length: int, groups: int, head_dim: int, num_queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    k, v = rows(2, 2, 1, length, head_dim, dtype=dtype, device=device)
    check(
        decode_attention,
        rows(2, groups, min(num_queries, length), head_dim, dtype=dtype, device=device),
        aligned(codec, k, start=3),
        turned(aligned(codec, v, start=3)),
        Layout(length, start=3),
        Visibility(seen=length, pads=(0, 0)),
        Scoring(head_dim**-0.5),
        num_splits=2 if num_queries > 1 else None,
    )


@pytest.mark.parametrize(
    ("codec", "page_size"),
    [
        *(("int8", 16), ("int4", 64), ("int8", 256)),
        *(pytest.param(codec, size, marks=pytest.mark.slow) for codec in ("int4", "fp8") for size in (16, 128)),
        *(pytest.param(codec, size, marks=pytest.mark.slow) for codec in ("int3", "int2") for size in (16, 64)),
    ],
)
def test_pages_in_any_order_with_spans_of_any_kind(codec: str, page_size: int, device: torch.device) -> None:
    length = 420
    k, v = rows(2, 2, 1, length, 64, device=device)
    spans = odd_spans(length, page_size)
    table = shuffled(2, len(spans) + 1)
    check(
        decode_attention,
        rows(2, 4, 1, 64, device=device),
        paged(codec, k, table, spans, page_size),
        turned(paged(codec, v, table, spans, page_size)),
        Layout(length, table=table, spans=spans),
        Visibility(seen=length, pads=(0, 177)),
        Scoring(0.125),
        num_splits=2,
    )


@pytest.mark.parametrize(
    "codecs", [("int4", "fp8"), ("fp8", "int8"), ("int8", "int4"), ("int3", "int2"), ("int2", "int4"), ("int8", "int3")]
)
def test_keys_and_values_of_their_own_codecs_and_widths(codecs: tuple[str, str], device: torch.device) -> None:
    check(
        decode_attention,
        rows(1, 4, 2, 96, device=device),
        aligned(codecs[0], rows(1, 1, 300, 96, device=device)),
        turned(aligned(codecs[1], rows(1, 1, 300, 40, device=device))),
        Layout(300),
        Visibility(seen=300, pads=(0,)),
        Scoring(0.1),
    )


# What the others are made of; they come in the slow tier.
FEW = ("ragged", "slots", "bounds of each row", "mask for all")


@pytest.mark.parametrize(("page_size", "codec"), [(0, "int8"), pytest.param(16, "fp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in VISIBILITIES]
)
def test_visibility(
    name: str, page_size: int, codec: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "digits_tiling", lambda *_: SMALL)
    length, visibility = VISIBILITIES[name]
    tensors = {part: getattr(visibility, part) for part in ("bounds", "mask")}
    moved = {part: tensor.to(device) for part, tensor in tensors.items() if tensor is not None}
    visibility = dataclasses.replace(visibility, **moved)
    k, v = rows(2, 3, 1, length, 64, device=device)
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
    keys, values = (aligned(codec, x) if table is None else paged(codec, x, table, spans, page_size) for x in (k, v))
    query = rows(3, 4, 3, 64, device=device)
    check(decode_attention, query, keys, turned(values), layout, visibility, Scoring(0.125), num_splits=2)


@pytest.mark.parametrize(
    ("num_splits", "softcap", "with_sinks"),
    [(3, 2.0, True), (1, None, True), pytest.param(3, None, False, marks=pytest.mark.slow)],
)
def test_scoring(num_splits: int, softcap: float | None, with_sinks: bool, device: torch.device) -> None:
    k, v = rows(2, 2, 1, 300, 64, device=device)
    sinks = torch.tensor([1.5, -40.0, 20.0, 0.0], dtype=BF16, device=device) if with_sinks else None
    check(
        decode_attention,
        rows(2, 4, 1, 64, device=device),
        aligned("int4", k),
        turned(aligned("int4", v)),
        Layout(300),
        Visibility(seen=300, pads=(300, 100)),
        Scoring(0.5, softcap=softcap, sink_logits=sinks),
        num_splits=num_splits,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of the interpreter, about NaN
def test_queries_without_digits_and_tokens_without_numbers_are_nan(device: torch.device) -> None:
    k, v = rows(2, 1, 1, 300, 64, device=device)
    query = rows(1, 4, 1, 64, device=device)
    query[0, 1, 0, 5], query[0, 2, 0, 6] = float("nan"), float("inf")
    arguments = Layout(300), Visibility(300, (0,)), Scoring(0.125)
    out, _ = decode_attention(query, aligned("int8", k), turned(aligned("int8", v)), *arguments)
    assert out.isnan().all(-1)[0, :, 0].tolist() == [False, True, True, False]
    assert not out[:, ::3].isnan().any()
    query[0, 1:3] = 0.0
    for codec in CODECS:
        for part in (k, v):
            spoiled = part.clone()
            spoiled[0, 0, 200, 7] = float("nan")
            keys, values = (aligned(codec, spoiled if part is x else x) for x in (k, v))
            assert decode_attention(query, keys, turned(values), *arguments)[0].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_a_sink_rounds_no_tail_away(codec: str, device: torch.device) -> None:
    # One weight of 0.992 and 8,000 that are 1e-6 each, of values that are alike where the sink's are small.
    length, dim = 8001, 64
    query = torch.zeros(1, 1, 1, dim, dtype=HALF, device=device)
    query[..., 0] = 8.0
    k = torch.zeros(1, 1, length, dim, dtype=HALF, device=device)
    k[0, 0, 0, 0] = 13.8125  # e^13.8 is a million
    v = 1 + rows(1, 1, length, dim, dtype=HALF, device=device) / 8
    v[0, 0, 0] /= 16
    planes = aligned(codec, k), turned(aligned(codec, v))
    arguments = query, *planes, Layout(length), Visibility(length, (0,)), Scoring(0.125)
    out, _ = decode_attention(*arguments, num_splits=2)
    expected, _ = attention_naive(*arguments, torch.float64)
    # The share of the tail is 8e-3, and of those beside the sink in its tile 1.3e-4.
    assert worst(out, expected) < 3e-4


@pytest.mark.parametrize(
    "codec", ["int8", "int4", "fp8", *(pytest.param(codec, marks=pytest.mark.slow) for codec in ("int3", "int2"))]
)
def test_keys_and_values_of_very_different_scales_in_a_tile(codec: str, device: torch.device) -> None:
    sizes = 10.0 ** (torch.arange(300, device=device) % 9 - 4)[:, None]
    k, v = (x * sizes for x in rows(2, 1, 1, 300, 64, dtype=SINGLE, device=device))
    query = rows(1, 4, 1, 64, device=device) * torch.tensor([1.0, 1e-2, 1e-5, 0.0], device=device)[:, None, None]
    arguments = Layout(300), Visibility(300, (0,)), Scoring(0.125)
    for keys, values in ((k, v), (k, v / sizes), (k / sizes, v)):
        encoded = aligned(codec, keys.to(BF16)), turned(aligned(codec, values.to(BF16)))
        check(decode_attention, query.to(BF16), *encoded, *arguments)


def test_equal_scores_average(device: torch.device) -> None:
    v = rows(1, 1, 640, 64, device=device)
    query = torch.zeros(1, 4, 1, 64, dtype=BF16, device=device)
    values = turned(aligned("int8", v))
    out, lse = decode_attention(query, aligned("int8", v), values, Layout(640), Visibility(640, (0,)), Scoring(0.125))
    expected, _ = attention_naive(
        query, aligned("int8", v), values, Layout(640), Visibility(640, (0,)), Scoring(0.125), torch.float64
    )
    assert worst(lse, torch.full_like(lse, 640).log().double()) < 1e-6
    assert worst(out, expected) < 1e-3


def test_int8_errs_as_its_codes_do(device: torch.device) -> None:
    k, v = rows(2, 1, 2, 400, 128, device=device)
    query = rows(1, 8, 1, 128, device=device)
    arguments = Layout(400), Visibility(400, (0,)), Scoring(128**-0.5)
    exact, _ = attention_naive(query, contiguous("none", k), contiguous("none", v), *arguments, torch.float64)
    keys, values = aligned("int8", k), aligned("int8", v)
    error = worst(decode_attention(query, keys, turned(values), *arguments)[0], exact)
    assert error <= 2e-2
    # Rounded as any output is.
    twin = attention_naive(query, keys, values, *arguments, torch.float64)[0].to(BF16)
    assert error <= 1.1 * worst(twin, exact)


def test_the_assembly_takes_the_nibbles_that_operations_on_bytes_do() -> None:
    registers = {"$2": torch.arange(-(1 << 31), 1 << 31, 65_537 * 1023)}  # words whose four bytes vary
    for line in NIBBLES.value.rstrip(";").split("; "):
        operation, target, source, number = line.replace(",", "").split()
        value = registers[source] & 0xFFFFFFFF
        registers[target] = value & int(number, 16) if operation == "and.b32" else value >> int(number)
        assert operation in ("and.b32", "shr.u32")
    words, low, high = (registers[name].to(torch.int32).view(torch.uint8) for name in ("$2", "$0", "$1"))
    assert torch.equal(low, words & 0xF)
    assert torch.equal(high, words >> 4)


@pytest.mark.parametrize("num_splits", [1, 8, 9])
def test_the_last_of_a_few_splits_merges_them(num_splits: int, device: torch.device) -> None:
    k, v = rows(2, 1, 1, 300, 64, device=device)
    keys, values, layout = aligned("int4", k), turned(aligned("int4", v)), Layout(300)
    visibility = Visibility(300, (50,))
    inputs = DeviceInputs.allocate(layout, visibility, device)
    merged = mock.Mock(wraps=call.merge)
    with mock.patch.object(call, "merge", merged), mock.patch.object(operator, "digits_tiling", return_value=SMALL):
        for _ in range(2):
            query = rows(1, 2, 1, 64, device=device)
            arguments = query, keys, values, layout, visibility, Scoring(0.125)
            check(decode_attention, *arguments, inputs=inputs, num_splits=num_splits)
            assert not inputs.counters.any()
    assert merged.call_count == (2 if num_splits > 8 else 0)
