"""Triton's attention to keys that were written less their mean, against the naive twin."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from hfkv.kernels.device_inputs import DeviceInputs, Rows
from hfkv.kernels.dispatch import attention_kernel, forget_choices
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.naive import ragged_naive
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.kernels.selftest.inputs import turned
from hfkv.kernels.triton import operator
from hfkv.kernels.triton.decode import decode_attention
from hfkv.kernels.triton.latent import latent_attention
from hfkv.kernels.triton.mean import tables
from hfkv.kernels.triton.mean.tables import MeanTables
from hfkv.kernels.triton.prefill import prefill_attention
from tests.kernels.cases import Case, case, check, windowed
from tests.kernels.test_key_mean import SHAPES, less_mean, waves

BF16, SINGLE, CPU = torch.bfloat16, torch.float32, torch.device("cpu")


def digits(query: torch.Tensor, keys: Encoded, values: Encoded, *given: Any, **options: Any) -> Any:
    """`decode_attention` by products of digits, of planes that have room for a multiple of 16 tokens."""
    keys, values = (part._replace(planes=tuple(map(with_room, part.planes))) for part in (keys, values))
    with mock.patch.object(operator, "_attention_kernel", None):
        return decode_attention(query, keys, turned(values), *given, **options)


def with_room(plane: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(plane.view(torch.uint8), (0, 0, 0, -plane.shape[2] % 16)).view(plane.dtype)


KERNELS: dict[str, Any] = {
    "decode": partial(decode_attention, num_splits=2),
    "digits": partial(digits, num_splits=2),
    "prefill": prefill_attention,
}
SHIFTS = (0, -3, 199_990)
# The kernel by which the default run takes each of `SHAPES`.
QUICK = (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 2)


@pytest.mark.parametrize(
    ("shape", "kernel", "shift"),
    [
        pytest.param(
            shape, kernel, SHIFTS[(at + place) % 2 + at % 2], marks=[] if place == QUICK[at] else pytest.mark.slow
        )
        for at, shape in enumerate(SHAPES)
        for place, kernel in enumerate(KERNELS)
        # Others are for few.
        if kernel == "prefill" or shape != "many queries"
    ],
)
def test_scores_get_back_what_was_taken_off(shape: str, kernel: str, shift: int) -> None:
    given, of_mean = SHAPES[shape]
    if kernel == "digits":
        given = {"dtype": BF16, **given}
        given["page_size"] = {96: 128, 8: 16}.get(given.get("page_size", 0))
    check(KERNELS[kernel], less_mean(case("int4", **given), shift, **of_mean))


@pytest.mark.parametrize("kernel", ["decode", "digits"])
@pytest.mark.parametrize("codec", ["int3", pytest.param("int2", marks=pytest.mark.slow)])
def test_every_codec_of_few_bits(kernel: str, codec: str) -> None:
    check(KERNELS[kernel], less_mean(case(codec, length=100, dtype=BF16, groups=2), 7))


@pytest.mark.parametrize(
    ("kernel", "page_size", "num_slots", "held_from", "num_queries", "rotation"),
    [
        ("decode", None, 4, 2, 1, "partial"),
        ("digits", 16, 4, 50, 1, "halves"),
        *(
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in (
                ("decode", 16, 0, 11, 7, "halves"),
                ("digits", None, 4, 2, 3, "interleaved"),
                ("prefill", 16, 4, 50, 17, "interleaved"),
            )
        ),
    ],
)
def test_padded_rows_under_a_window(
    kernel: str, page_size: int | None, num_slots: int, held_from: int, num_queries: int, rotation: str
) -> None:
    """Each row has positions of its own, and those in slots theirs."""
    pads = (0, 3, 13)
    dtype = BF16 if kernel == "digits" else SINGLE
    given = case("int4", dtype=dtype, batch=3, pads=pads, num_queries=num_queries, page_size=page_size, length=150)
    given = windowed(given, 120, sinks=4, num_slots=num_slots, held_from=held_from)
    shifts = [held_from - num_slots - pad for pad in pads]
    given = less_mean(given, *shifts, num_slots=num_slots, rotation=rotation, size=2.0)
    check(KERNELS[kernel], given)
    # Slots that are not known as such, since all tokens of another window are held.
    check(
        KERNELS[kernel],
        replace(given, visibility=replace(given.visibility, num_slots=0, held_from=0, sinks=0, bounds=None)),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_masks_and_rows_of_their_own_lengths(kernel: str) -> None:
    given = less_mean(case("int4", batch=2, length=150, dtype=BF16 if kernel == "digits" else SINGLE), 40, -9)
    mask = torch.rand(2, 1, 1, 150, generator=torch.Generator().manual_seed(1)) < 0.4
    check(KERNELS[kernel], replace(given, visibility=replace(given.visibility, mask=mask)))
    lengths = Rows((150, 31), (150, 31))
    inputs = DeviceInputs.allocate(given.layout, given.visibility, CPU, rows=lengths)
    check(partial(KERNELS[kernel], inputs=inputs), given, partial(ragged_naive, rows=lengths))


def test_what_is_no_mean_of_these_keys_is_refused() -> None:
    given = less_mean(case("int4", batch=2), 3, 5)
    placed = given.keys.mean
    assert placed is not None

    def of(mean: PlacedMean) -> Case:
        return replace(given, keys=given.keys._replace(mean=mean))

    for wrong in (replace(placed, shifts=(3,)), replace(placed, slots=torch.zeros(2, 1).long())):
        with pytest.raises(ValueError, match="a mean of 2 rows, slot i at position i, got one"):
            decode_attention(*of(wrong).arguments)
    with pytest.raises(ValueError, match=r"a mean of shape \(1, 64\) on cpu is not one of 2 kv heads"):
        prefill_attention(*of(replace(placed, mean=placed.mean.of_heads([1]))).arguments)
    query, keys, *rest = less_mean(case("int4", kv_heads=1), 3).arguments
    with pytest.raises(ValueError, match="knows of no mean"):
        latent_attention(torch.cat((query, query), dim=-1), keys, *rest)


def test_a_query_that_is_not_finite_spoils_its_own_row() -> None:
    for kernel, dtype in (("decode", SINGLE), ("digits", BF16)):
        given = less_mean(case("int4", length=150, num_queries=2, dtype=dtype), 7)
        expected = KERNELS[kernel](*given.arguments).out
        given.query[:, 1, 0, 3] = torch.inf
        out = KERNELS[kernel](*given.arguments).out
        assert out[:, 1, 0].isnan().all()
        out[:, 1, 0] = expected[:, 1, 0]
        assert torch.equal(out, expected)


def test_tables_grow_with_a_text_and_go_with_their_rotation() -> None:
    rotation = waves(64, "partial")
    first = MeanTables.of(rotation, 5, 100, CPU, torch.float16)
    assert MeanTables.of(rotation, 0, len(first.waves), CPU, torch.float16) is first
    grown = MeanTables.of(rotation, -20, 5000, CPU, torch.float16)
    assert len(grown.waves) >= 2 * len(first.waves)
    assert torch.equal(grown.waves[: len(first.waves)], first.waves)
    # Padding stands in front, in memory.
    kept = grown.waves.as_strided((32, 2, 16), grown.waves.stride(), grown.waves.storage_offset() - 32 * 2 * 16)
    assert torch.equal(kept[-7, :, :8], torch.stack((grown.waves[7, 0, :8], -grown.waves[7, 1, :8])))
    cos, sin = rotation.at(0, 5000, CPU)
    assert (grown.waves[:5000, :, :8].float() - torch.stack((cos, sin), dim=1)[..., :8]).abs().max() < 2**-11
    assert torch.equal(grown.turns[3, 0, :8], cos[48, :8])
    assert not grown.waves[..., 8:].any()
    count = len(tables._known)
    del rotation
    gc.collect()
    assert len(tables._known) == count - 1


def test_kernels_of_a_gpu_take_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfkv.kernels.triton.backend.unsupported", lambda *_: None)
    forget_choices()
    for num_queries in (1, 64):
        kernel = attention_kernel("int4", BF16, torch.device("cuda"), num_queries, (64, 64), has_mean=True)
        assert kernel.takes_means
        assert kernel.run in (decode_attention, prefill_attention)
    forget_choices()
