"""`latent_attention` against its naive twin."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.library import opcheck

from hfkv.codecs import CODECS
from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.triton.append import append
from hfkv.kernels.triton.latent import latent_attention
from hfkv.kernels.triton.support import unsupported_latent
from hfkv.kernels.triton.tiling import Device, latent_tiling
from hfkv.stores.layout import Layout
from tests.kernels.held import WHOLE, check, contiguous, garbage, odd_spans, paged, shuffled, sparse, worst
from tests.kernels.test_triton_decode import BF16, HALF, QUERIES, SINGLE, VISIBILITIES, rows

check_latent = partial(check, latent_attention, twin=latent_attention_naive)


@pytest.mark.parametrize(
    ("length", "num_heads", "dims", "num_queries", "dtype"),
    [
        (1, 1, (64, 16), 1, BF16),
        (63, 5, (80, 24), 3, HALF),
        (200, 16, (128, 64), 1, BF16),
        (70, 33, (512, 64), 1, SINGLE),
        (63, 4, (96, 5), 16, BF16),
        (130, 2, (5, 96), 1, SINGLE),
    ],
)
@pytest.mark.parametrize("codec", WHOLE)
def test_shapes(
    codec: str,
    length: int,
    num_heads: int,
    dims: tuple[int, int],
    num_queries: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    latents, rotary = (rows(2, 1, length, dim, dtype=dtype, device=device) for dim in dims)
    check_latent(
        rows(2, num_heads, min(num_queries, length), sum(dims), dtype=dtype, device=device),
        contiguous(codec, latents, start=3, spare=70),
        # Scales of their own.
        contiguous(codec, rotary * 5, start=3, spare=70),
        Layout(length, start=3),
        Visibility(seen=length, pads=(0, length // 3)),
        Scoring(sum(dims) ** -0.5),
        num_splits=2 if num_queries > 1 else None,
    )


@pytest.mark.parametrize("codec", WHOLE)
@pytest.mark.parametrize("page_size", [6, 16, 64])
def test_pages_in_any_order_with_spans_of_any_kind(codec: str, page_size: int, device: torch.device) -> None:
    length = 203
    spans = odd_spans(length, page_size)
    table = shuffled(2, len(spans) + 1)
    check_latent(
        rows(2, 8, 1, 80, device=device),
        paged(codec, rows(2, 1, length, 64, device=device), table, spans, page_size),
        paged(codec, rows(2, 1, length, 16, device=device), table, spans, page_size),
        Layout(length, table=table, spans=spans),
        Visibility(seen=length, pads=(0, 77)),
        Scoring(0.125),
        num_splits=2,
    )


@pytest.mark.parametrize("name", VISIBILITIES)
@pytest.mark.parametrize("page_size", [0, 16])
def test_visibility(name: str, page_size: int, device: torch.device) -> None:
    length, visibility = VISIBILITIES[name]
    tensors = {part: getattr(visibility, part) for part in ("bounds", "mask")}
    moved = {part: tensor.to(device).clone() for part, tensor in tensors.items() if tensor is not None}
    visibility = dataclasses.replace(visibility, **moved)
    latents, rotary = rows(3, 1, length, 64, device=device), rows(3, 1, length, 16, device=device)
    if "mask" in moved:
        # What nobody sees may hold anything.
        latents[:, :, visibility.first + 3] = float("nan")
        moved["mask"][..., 3] = False
    elif name == "ragged":
        latents[1, :, :41] = float("nan")
        rotary[2] = float("nan")
    spans = odd_spans(length, page_size) if page_size else ()
    table = shuffled(3, len(spans)) if page_size else None
    parts = (
        contiguous("int8", x) if table is None else paged("int8", x, table, spans, page_size) for x in (latents, rotary)
    )
    query = rows(3, 4, QUERIES, 80, device=device)
    check_latent(query, *parts, Layout(length, table=table, spans=spans), visibility, Scoring(0.125), num_splits=2)


@pytest.mark.parametrize(("num_splits", "softcap", "with_sinks"), [(1, None, True), (3, 2.0, False), (5, 2.0, True)])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_scoring(codec: str, num_splits: int, softcap: float | None, with_sinks: bool, device: torch.device) -> None:
    sinks = torch.tensor([1.5, -40.0, 20.0, 0.0], dtype=BF16, device=device) if with_sinks else None
    check_latent(
        rows(2, 4, 1, 96, device=device),
        contiguous(codec, rows(2, 1, 333, 64, device=device)),
        contiguous(codec, rows(2, 1, 333, 32, device=device)),
        Layout(333),
        Visibility(seen=333, pads=(333, 100)),
        Scoring(0.5, softcap=softcap, sink_logits=sinks),
        num_splits=num_splits,
    )


def test_a_short_prefill_sees_no_future(device: torch.device) -> None:
    # Several tiles of rows, each of them with a last token of its own.
    check_latent(
        rows(1, 6, 40, 48, dtype=SINGLE, device=device),
        contiguous("int8", rows(1, 1, 100, 32, device=device)),
        contiguous("int8", rows(1, 1, 100, 16, device=device)),
        Layout(100),
        Visibility(seen=100, pads=(7,)),
        Scoring(0.2),
    )


def test_queries_and_planes_that_are_views(device: torch.device) -> None:
    query = rows(2, 3, 4, 192, device=device)[..., 64:144].transpose(1, 2)
    latents, rotary = (contiguous("int8", rows(2, 1, 50, dim, device=device)) for dim in (64, 16))
    wide = latents.planes[0].new_zeros(2, 1, 50, 90)
    wide[..., :64], wide[..., 70:86] = latents.planes[0], rotary.planes[0]
    latents = latents._replace(planes=(wide[..., :64], latents.planes[1]))
    rotary = rotary._replace(planes=(wide[..., 70:86], rotary.planes[1]))
    check_latent(query, latents, rotary, Layout(50), Visibility(50, (0, 5)), Scoring(0.125))


@pytest.mark.parametrize("codec", WHOLE)
@pytest.mark.parametrize("page_size", [0, 8])
def test_one_set_of_inputs_serves_every_step(codec: str, page_size: int, device: torch.device) -> None:
    """Steps as a captured graph takes them: what `append` writes is attended to, and nothing is uploaded anew."""
    dims, num_slots = (32, 16), 16
    table = shuffled(2, num_slots // page_size) if page_size else None
    shape = (2, 1, num_slots) if table is None else (table.numel(), 1, page_size)
    latents, rotary = (garbage(codec, (*shape, dim), SINGLE, device) for dim in dims)

    def at(seen: int) -> Layout:
        spans = tuple((0, min(page_size, seen - low)) for low in range(0, seen, page_size)) if page_size else ()
        return Layout(seen, table=table, spans=spans)

    inputs = DeviceInputs.allocate(at(0), Visibility(0, (0, 0)), device)
    for seen in (0, 5, 10):
        new = tuple(rows(2, 1, 5, dim, dtype=SINGLE, device=device) for dim in dims)
        inputs.update(at(seen), Visibility(seen, (0, 2)))
        append(*new, latents, rotary, at(seen), inputs=inputs)
        visibility = Visibility(seen + 5, (0, 2))
        inputs.update(at(seen + 5), visibility)
        query = rows(2, 2, 1, sum(dims), device=device)
        check_latent(query, latents, rotary, at(seen + 5), visibility, Scoring(0.2), inputs=inputs)


def test_planes_larger_than_32_bits_count(device: torch.device) -> None:
    near = [contiguous("int8", rows(1, 1, 16, dim, dtype=SINGLE, device=device)) for dim in (64, 16)]
    far = []
    for part in near:
        data, scale = part.planes
        plane = sparse((40_001, 1, 16, part.head_dim), (65_536, 64, 64, 1), device)
        scales = torch.empty(40_001, 1, 16, 1, dtype=torch.bfloat16, device=device)
        plane[40_000], scales[40_000] = data[0], scale[0]
        far.append(Encoded(CODECS["int8"], (plane, scales), part.head_dim))
    query, visibility = rows(1, 1, 1, 80, dtype=SINGLE, device=device), Visibility(16, (0,))
    layout = Layout(16, table=torch.tensor([[40_000]]), spans=((0, 16),))
    out, _ = latent_attention(query, *far, layout, visibility, Scoring(0.125))
    expected, _ = latent_attention_naive(query, *near, Layout(16), visibility, Scoring(0.125))
    assert worst(out, expected.double()) < 1e-5


@pytest.mark.parametrize("codecs", [("int4", "none"), ("none", "int8"), ("int8", "int4")])
def test_rotary_keys_of_their_own_codec(codecs: tuple[str, str], device: torch.device) -> None:
    check_latent(
        rows(1, 8, 2, 80, device=device),
        contiguous(codecs[0], rows(1, 1, 100, 64, device=device)),
        contiguous(codecs[1], rows(1, 1, 100, 16, device=device)),
        Layout(100),
        Visibility(seen=100, pads=(0,)),
        Scoring(0.1),
    )


def test_no_queries_are_no_work(device: torch.device) -> None:
    latents, rotary = (contiguous("int8", rows(1, 1, 8, dim, device=device)) for dim in (64, 16))
    query = rows(1, 2, 0, 80, device=device)
    out, lse = latent_attention(query, latents, rotary, Layout(8), Visibility(8, (0,)), Scoring(1.0))
    assert out.shape == (1, 2, 0, 64)
    assert lse.shape == (1, 2, 0)


def test_what_cannot_be_is_refused(device: torch.device) -> None:
    latents, rotary = (contiguous("int8", rows(2, 1, 8, dim, device=device)) for dim in (64, 16))
    two, short = (contiguous("int8", rows(2, *shape, 16, device=device)) for shape in ((2, 8), (1, 7)))
    query, layout, visibility = rows(2, 4, 1, 80, device=device), Layout(8), Visibility(8, (0, 0))
    for wrong, message in (
        ((query, latents, two, layout, visibility, Scoring(1.0)), "one kv head in the same rows"),
        ((query, latents, short, layout, visibility, Scoring(1.0)), "one kv head in the same rows"),
        ((query[..., :64], latents, rotary, layout, visibility, Scoring(1.0)), "of 80 dimensions"),
        ((query, latents, rotary, layout, Visibility(8, (0,)), Scoring(1.0)), "1 rows"),
        ((query, latents, rotary, layout, visibility, Scoring(1.0, weights=True)), "attention weights"),
    ):
        with pytest.raises(ValueError, match=message):
            latent_attention(*wrong)
    with pytest.raises(ValueError, match="at most 128"):
        latent_attention(query, latents, rotary, layout, visibility, Scoring(1.0), num_splits=129)


@pytest.mark.parametrize("shared_memory", [84 << 10, 148 << 10, 212 << 10])
@pytest.mark.parametrize("page_size", [0, 10, 16, 64])
def test_tiles_fit_the_shared_memory(shared_memory: int, page_size: int) -> None:
    device = Device(132, shared_memory)
    for num_rows in (1, 16, 20, 128, 4096):
        for dtype, item_size in ((BF16, 2), (HALF, 4), (SINGLE, 4)):
            for token_bytes in (288, 576, 576 * dtype.itemsize):
                tiles = latent_tiling(device, num_rows, (512, 64), dtype, item_size, token_bytes, page_size)
                buffers = tiles.num_stages // 2 if page_size else tiles.num_stages - 1
                assert buffers >= 1
                queries = tiles.block_m * 576 * dtype.itemsize
                assert queries + buffers * tiles.block_n * token_bytes <= shared_memory
                assert page_size in (0, 10) or page_size % tiles.block_n == 0


def test_reasons_not_to_use_triton() -> None:
    assert "NVIDIA" in str(unsupported_latent(torch.device("cpu"), BF16, ("int8",), 512, 64))
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        assert unsupported_latent(gpu, BF16, ("int8",), 512, 64) is None
        assert "not 1024 and 64" in str(unsupported_latent(gpu, BF16, ("int8",), 1024, 64))
        assert "not 512 and 512" in str(unsupported_latent(gpu, BF16, ("int8",), 512, 512))
        assert "weights" in str(unsupported_latent(gpu, BF16, ("int8",), 512, 64, Scoring(1.0, weights=True)))


@pytest.mark.filterwarnings("ignore")
def test_the_operator_keeps_torchs_contract(device: torch.device) -> None:
    latents, rotary = (contiguous("int4", rows(1, 1, 20, dim, device=device)) for dim in (64, 16))
    inputs = DeviceInputs.allocate(Layout(20), Visibility(20, (0,)), device)
    planes = (list(latents.planes), list(rotary.planes), "int4", "int4", 64)
    arguments = (rows(1, 2, 1, 80, device=device), *planes, inputs.meta, 0, None, None, None, 0.125, None, 20, 2, None)
    opcheck(torch.ops.hfkv.latent_attention.default, arguments)
