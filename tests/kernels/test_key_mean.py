"""Kernels of a CPU on keys that were written less their mean, against the naive twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hfkv.codecs import CODECS
from hfkv.codecs.key_mean import KeyMean
from hfkv.codecs.waves import Waves
from hfkv.kernels.cpu.decode import decode_attention
from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.dispatch import attention_kernel
from hfkv.kernels.inputs import Scoring
from hfkv.kernels.merge import Attended
from hfkv.kernels.native.kernels import attend, step_attention
from hfkv.kernels.native.library import library, why_not
from hfkv.kernels.native.wave_tables import WaveTables
from hfkv.kernels.placed_mean import PlacedMean
from hfkv.stores.layout import Layout
from tests.kernels.cases import Case, case, check, cut_short, windowed

KERNELS: dict[str, Any] = {"native": attend, "decode": decode_attention, "flash": flash_attention}
needs_native = pytest.mark.skipif(library() is None, reason=why_not() or "none")
# The share of a row that is turned, and whether pairs lie side by side.
ROTATIONS = {"halves": (1.0, False), "interleaved": (1.0, True), "partial": (0.25, False), "none": (0.0, False)}


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts are cut in several."""
    cut_short(monkeypatch, stretch=64)


def waves(head_dim: int, rotation: str = "halves", base: float = 1e4) -> Waves:
    share, interleaved = ROTATIONS[rotation]
    half = int(head_dim * share) // 2
    return Waves(base ** -(torch.arange(half, dtype=torch.float64) / max(half, 1)), interleaved, head_dim)


def less_mean(given: Case, *shifts: int, num_slots: int = 0, size: float = 1.0, **rotation: Any) -> Case:
    """The same planes, said to be keys less a mean, which are at positions `shifts` and on, one for each row."""
    width, heads = given.keys.head_dim, given.keys.planes[0].shape[1]
    mean = KeyMean(
        torch.randn(heads, width, generator=torch.Generator().manual_seed(3)) * size, waves(width, **rotation)
    )
    rows = len(given.query)
    placed = PlacedMean(mean, shifts if len(shifts) == rows else shifts[:1] * rows, num_slots)
    return replace(given, keys=given.keys._replace(mean=placed))


def skip_what_is_not_here(kernel: str, codec: str, dtype: torch.dtype = torch.float32) -> None:
    if kernel == "native" and library() is None:
        pytest.skip(why_not())
    if kernel == "native" and codec.endswith("none") and dtype == torch.float16:
        pytest.skip("plain fp16 tokens are not its own")
    if kernel == "decode" and codec == "none":
        pytest.skip("it reads codes")
    if kernel == "decode" and "int" in codec and not is_exact():
        pytest.skip("without exact int8 products no processor is given this kernel")


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one row": ({"length": 300}, {}),
    "one query head": ({"length": 131, "groups": 1, "head_dim": 128}, {"rotation": "interleaved"}),
    "eight query heads": ({"length": 63, "groups": 8, "head_dim": 96}, {"base": 5e5}),
    "partly turned": ({"length": 200, "head_dim": 80, "num_queries": 3}, {"rotation": "partial"}),
    "not turned": ({"length": 70, "num_queries": 5}, {"rotation": "none"}),
    "one token": ({"length": 1, "head_dim": 8}, {"size": 5.0}),
    "half": ({"length": 150, "dtype": torch.bfloat16, "num_queries": 2}, {"size": 3.0}),
    "float16": ({"length": 150, "dtype": torch.float16, "softcap": 20.0}, {}),
    "pages": ({"length": 150, "batch": 2, "page_size": 8, "odd_spans": True, "num_queries": 7}, {}),
    "large pages": ({"length": 300, "batch": 2, "page_size": 96, "sink_logits": True, "num_queries": 7}, {"base": 1e6}),
    "many queries": ({"length": 150, "batch": 2, "pads": (0, 9), "num_queries": 63, "dtype": torch.bfloat16}, {}),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", [*CODECS, "k:int4+v:int8", "k:int2+v:none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0, -3, 199_990])
def test_scores_get_back_what_was_taken_off(kernel: str, codec: str, shape: str, shift: int) -> None:
    given, of_mean = SHAPES[shape]
    skip_what_is_not_here(kernel, codec, given.get("dtype", torch.float32))
    check(KERNELS[kernel], less_mean(case(codec, **given), shift, **of_mean))


@pytest.mark.pairwise
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
@pytest.mark.parametrize("rotation", ["halves", "partial"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(("num_slots", "held_from"), [(0, 11), (4, 2), (4, 50)])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_padded_rows_under_a_window(
    kernel: str, codec: str, rotation: str, page_size: int | None, num_slots: int, held_from: int, num_queries: int
) -> None:
    """Each row has positions of its own, and those in slots theirs."""
    skip_what_is_not_here(kernel, codec)
    pads = (0, 3, 13)
    given = case(codec, batch=3, pads=pads, num_queries=num_queries, page_size=page_size, length=90)
    given = windowed(given, 40, sinks=4, num_slots=num_slots, held_from=held_from)
    shifts = [held_from - num_slots - pad for pad in pads]
    given = less_mean(given, *shifts, num_slots=num_slots, rotation=rotation, size=2.0)
    check(KERNELS[kernel], given)
    # Slots that are not known as such, since all tokens of another window are held.
    check(KERNELS[kernel], replace(given, visibility=replace(given.visibility, num_slots=0, held_from=0)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["int8", "int4", "int3", "fp8"])
def test_a_mean_of_ten_times_the_rest_costs_no_exactness(kernel: str, codec: str) -> None:
    skip_what_is_not_here(kernel, codec)
    for rotation in ROTATIONS:
        # Of so many queries that the twin's own error is that of float32.
        given = case(codec, batch=2, length=203, head_dim=128, num_queries=15)
        check(KERNELS[kernel], less_mean(given, 150_000, size=10.0, rotation=rotation))


@pytest.mark.parametrize("kernel", KERNELS)
def test_part_of_the_tokens_stands_where_it_stood(kernel: str) -> None:
    skip_what_is_not_here(kernel, "int4")
    given = less_mean(case("int4", length=200, batch=2), 5, -8, num_slots=4)
    begin = 130
    assert given.keys.mean is not None
    expected = given.keys.mean.turned(begin, 200)
    layout, placed = Layout(70, start=3 + begin), given.keys.mean.of(begin)
    assert torch.equal(placed.turned(0, 70), expected)
    given = replace(given, layout=layout, visibility=given.visibility.of(begin, 200))
    check(KERNELS[kernel], replace(given, keys=given.keys._replace(mean=placed)))


@needs_native
@pytest.mark.parametrize("codec", ["int4", "fp8"])
def test_other_layers_of_a_step_have_means_of_their_own(codec: str) -> None:
    first, second = less_mean(case(codec, seed=1), 9), less_mean(case(codec, seed=2), 9, size=2.0)
    step = step_attention(*first.arguments, inputs=None)
    assert second.keys.mean is not None
    planes, vector = (*second.keys.planes, *second.values.planes), second.keys.mean.mean.vector
    assert step.takes(second.query, planes)

    def run(*_: object) -> Attended:
        out = step.run(second.query, planes, second.scoring.scale, vector)
        return Attended(out.transpose(1, 2), step.lse)

    check(run, second)
    for wrong in (None, vector[:1], vector[:, :8]):
        with pytest.raises(ValueError, match="keys have a mean of shape"):
            step.run(second.query, planes, 1.0, *(() if wrong is None else (wrong,)))
    without = step_attention(*case(codec).arguments, inputs=None)
    with pytest.raises(ValueError, match="keys have a mean of shape"):
        without.run(second.query, planes, 1.0, vector)


@needs_native
def test_what_the_native_code_cannot_place_is_refused() -> None:
    given = less_mean(case("int4", batch=2), 3, 5)
    placed = given.keys.mean
    assert placed is not None
    for wrong in (replace(placed, shifts=(3,)), replace(placed, slots=torch.zeros(2, 1).long())):
        with pytest.raises(ValueError, match="a mean of 2 rows, slot i at position i, got one"):
            attend(*replace(given, keys=given.keys._replace(mean=wrong)).arguments)


@needs_native
def test_a_query_that_is_not_finite_spoils_its_own_row() -> None:
    given = less_mean(case("int4", length=200, num_queries=2), 7)
    expected = attend(*given.arguments).out
    given.query[:, 1, 0, 3] = torch.inf
    out = attend(*given.arguments).out
    assert out[:, 1, 0].isnan().all()
    out[:, 1, 0] = expected[:, 1, 0]
    assert (out - expected).abs().max() < 1e-5


@needs_native
def test_tables_grow_with_a_text_and_are_the_same_ones() -> None:
    given = case("int8", length=300)
    rotation = waves(64)
    mean = KeyMean(torch.randn(2, 64), rotation)
    outs = []
    for shift in (0, 50_000, 0):
        keys = given.keys._replace(mean=PlacedMean(mean, (shift,)))
        outs.append(attend(*replace(given, keys=keys).arguments).out)
    assert torch.equal(outs[0], outs[2])
    known = WaveTables.of(rotation, 100)
    assert known is WaveTables.of(rotation, 50_000)
    assert WaveTables.of(rotation, 60_000).num_turns >= 2 * known.num_turns


@needs_native
@pytest.mark.parametrize("base", [100.0, 1e4, 1e7])
def test_interpolated_waves_are_as_exact_as_float32(base: float) -> None:
    """A log-sum-exp of one token is its score: at each place of a tile, of every pair alone."""
    rotation = waves(128, base=base)
    given = case("none", head_dim=128, length=64, kv_heads=1, groups=1)
    for plane in given.keys.planes:
        plane.zero_()
    pairs = torch.eye(64).repeat(1, 2)[None, :, None] / 2**0.5
    query = torch.cat((pairs, pairs * torch.tensor([1.0, -1.0]).repeat_interleave(64)), dim=1)
    mean = PlacedMean(KeyMean(torch.ones(1, 128), rotation), (1000,))
    for token in (0, 1, 17, 31, 32, 63):
        mask = torch.zeros(1, 1, 1, 64, dtype=torch.bool)
        mask[..., token] = True
        visibility = replace(given.visibility, mask=mask)
        keys = given.keys._replace(mean=mean)
        lse = attend(query, keys, given.values, given.layout, visibility, Scoring(1.0)).lse.double()
        angles = (1000 + token) * rotation.inv_freq
        exact = 2**0.5 * torch.cat((angles.cos(), -angles.sin()))
        assert (lse.flatten() - exact).abs().max() < 6e-7


def test_kernels_of_a_cpu_take_means() -> None:
    for codec in ("int4", "int3", "int2"):
        for num_queries in (1, 64):
            kernel = attention_kernel(codec, torch.bfloat16, torch.device("cpu"), num_queries, (64, 64), has_mean=True)
            assert kernel.takes_means
            assert kernel.run is not None
