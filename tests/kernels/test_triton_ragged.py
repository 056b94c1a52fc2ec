"""Rows of different lengths in one launch, each as if it were alone."""

from functools import partial
from typing import Any

import pytest
import torch

from hfkv.kernels.device_inputs import DeviceInputs, Rows
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.latent_naive import latent_attention_naive
from hfkv.kernels.naive import append_naive, ragged_naive, row_of
from hfkv.kernels.selftest.inputs import turned
from hfkv.kernels.triton.append import append
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.latent import latent_attention
from hfkv.stores.layout import Layout
from tests.kernels.held import check, contiguous, garbage, odd_spans, paged, shuffled, worst
from tests.kernels.test_triton_decode import BF16, rows

LENGTH = 144
LENGTHS = Rows((LENGTH, 0, 1, 77), (LENGTH, 0, 1, 77), (0, 0, 0, 3))


def held(codec: str, page_size: int, device: torch.device) -> tuple[Encoded, Encoded, Layout]:
    spans = odd_spans(LENGTH, page_size) if page_size else ()
    table = shuffled(4, len(spans)) if page_size else None
    k, v = rows(2, 4, 1, LENGTH, 64, device=device)
    for row, length in enumerate(LENGTHS.lengths):
        k[row, :, length:], v[row, :, length:] = float("nan"), float("nan")
    keys, values = (contiguous(codec, x) if table is None else paged(codec, x, table, spans, page_size) for x in (k, v))
    return keys, values, Layout(LENGTH, table=table, spans=spans)


@pytest.mark.pairwise
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("is_windowed", [False, True])
def test_rows_attend_as_alone(codec: str, page_size: int, is_windowed: bool, device: torch.device) -> None:
    keys, values, layout = held(codec, page_size, device)
    t = torch.tensor(LENGTHS.seen, device=device)[:, None]
    visibility = Visibility(LENGTH, (5, 0, 0, 0), bounds=t - 40 if is_windowed else None, sinks=2 * is_windowed)
    check(
        decode_attention,
        rows(4, 2, 1, 64, device=device),
        keys,
        values if codec == "none" else turned(values),
        layout,
        visibility,
        Scoring(0.125),
        twin=partial(ragged_naive, rows=LENGTHS),
        inputs=DeviceInputs.allocate(layout, visibility, device, rows=LENGTHS),
        num_splits=2,
    )


def test_lengths_change_in_place(device: torch.device) -> None:
    keys, values, layout = held("int8", 0, device)
    query, visibility, scoring = rows(4, 2, 1, 64, device=device), Visibility(LENGTH, (0,) * 4), Scoring(0.125)
    inputs = DeviceInputs.allocate(layout, visibility, device, rows=LENGTHS)
    fewer = Rows((9, 0, 1, 70), (9, 0, 1, 70))
    inputs.update(layout, visibility, fewer)
    out, _ = decode_attention(query, keys, values, layout, visibility, scoring, inputs=inputs)
    for row in (0, 2, 3):
        alone, _ = decode_attention(*row_of(query, keys, values, layout, visibility, fewer, row), scoring)
        assert worst(out[row], alone[0].double()) < 1e-2
    with pytest.raises(ValueError, match="at every step or at none"):
        inputs.update(layout, visibility)
    for wrong in (Rows((9, 0, 1), (9, 0, 1)), Rows((LENGTH + 1, 0, 1, 2), (9, 0, 1, 2))):
        with pytest.raises(ValueError, match="rows"):
            inputs.update(layout, visibility, wrong)


def test_latents_of_rows(device: torch.device) -> None:
    latents, rotary = (contiguous("int8", rows(4, 1, LENGTH, dim, device=device)) for dim in (64, 16))
    visibility, layout = Visibility(LENGTH, (0,) * 4), Layout(LENGTH)
    query = rows(4, 2, 1, 80, device=device)
    inputs = DeviceInputs.allocate(layout, visibility, device, rows=LENGTHS)
    out, _ = latent_attention(query, latents, rotary, layout, visibility, Scoring(0.1), inputs=inputs)
    for row in range(4):
        alone = row_of(query, latents, rotary, layout, visibility, LENGTHS, row)
        assert worst(out[row], latent_attention_naive(*alone, Scoring(0.1), torch.float64)[0][0]) < 1e-2


@pytest.mark.parametrize("page_size", [0, 16])
def test_tokens_are_written_behind_each_row(page_size: int, device: torch.device) -> None:
    lengths = Rows((20, 1, 7), (0,) * 3)
    layout = Layout(20, start=2)
    shape = (3, 1, 32, 64)
    if page_size:
        layout = Layout(20, table=shuffled(3, 3), spans=((0, 16), (0, 4)))
        shape = (9, 1, page_size, 64)
    new: Any = rows(2, 3, 1, 3, 64, device=device)
    sides = [[garbage("int8", shape, BF16, device) for _ in range(2)] for _ in range(2)]
    inputs = DeviceInputs.allocate(layout, Visibility(20, (0,) * 3), device, rows=lengths)
    append(*new, *sides[0], layout, inputs=inputs)
    for row, length in enumerate(lengths.lengths):
        part = [x if page_size else Encoded(x.codec, tuple(p[row : row + 1] for p in x.planes), 64) for x in sides[1]]
        own = Layout(length, start=layout.start)
        if layout.table is not None:
            spans = ((0, min(length, 16)), (0, length - 16))[: 1 + (length > 16)]
            own = Layout(length, table=layout.table[row : row + 1], spans=spans)
        append_naive(*new[:, row : row + 1], *part, own)
    for one, other in zip(*sides, strict=True):
        for plane, expected in zip(one.planes, other.planes, strict=True):
            assert torch.equal(plane.view(torch.uint8), expected.view(torch.uint8))
