"""Which tiles are visited, how they are cut into splits, and the inputs on the device."""

import dataclasses

import pytest
import torch

from hfkv.kernels.device_inputs import DeviceInputs, device_inputs
from hfkv.kernels.inputs import Scoring, Visibility
from hfkv.kernels.naive import visible_naive
from hfkv.kernels.triton.support import unsupported
from hfkv.kernels.triton.tiling import Device, choose_splits, tiling
from hfkv.stores.layout import Layout
from tests.kernels.triton_ranges import ranges_kernel

BLOCK_N = 16


@pytest.mark.pairwise
@pytest.mark.parametrize("hole", [0, 40])
@pytest.mark.parametrize("pad", [0, 50, 118, 300])
@pytest.mark.parametrize(
    ("length", "held_from", "num_slots", "sinks", "window"),
    [(300, 0, 0, 0, 300), (300, 0, 0, 5, 40), (184, 120, 4, 4, 50), (184, 120, 4, 0, 1), (84, 220, 4, 4, 20)],
)
def test_only_tiles_with_something_to_see_are_visited(
    length: int, held_from: int, num_slots: int, sinks: int, window: int, pad: int, hole: int, device: torch.device
) -> None:
    seen, num_queries = 300, 30
    bounds = torch.arange(seen - num_queries, seen, device=device)[None] - window + 1
    visibility = Visibility(seen, (pad,), 0, held_from, num_slots, sinks, bounds=bounds)
    seen_by_any = visible_naive(visibility, Layout(length), num_queries, device)[0, 0].any(0)
    ranges = torch.zeros(6, dtype=torch.int32, device=device)
    lowest = max(int(bounds.min()), pad)
    rule = (0, length, length + hole, num_slots, held_from, pad, sinks, lowest, seen - 1)
    ranges_kernel[(1,)](*rule, ranges, BLOCK_N)
    visited = [tile for begin, end in ranges.view(3, 2).tolist() for tile in range(begin, end)]
    assert visited == sorted(set(visited))
    assert all(0 <= tile * BLOCK_N < length + hole for tile in visited)
    # The slot of held token i is i where nothing is missing, and at most i + hole.
    needed = {slot // BLOCK_N for i in seen_by_any.nonzero().flatten().tolist() for slot in (i, i + hole)}
    assert needed <= set(visited)
    if not hole and not num_slots:
        assert needed == set(visited)


def test_splits_are_the_fewest_that_keep_the_device_busy() -> None:
    device = Device(num_multiprocessors=132, shared_memory=1 << 17)
    assert choose_splits(device, num_programs=64, num_tiles=512) == 4
    assert choose_splits(device, num_programs=264, num_tiles=512) == 1
    assert choose_splits(device, num_programs=8, num_tiles=2048) == 29
    assert choose_splits(device, num_programs=8, num_tiles=32) == 7
    assert choose_splits(device, num_programs=8, num_tiles=1) == 1
    assert choose_splits(device, num_programs=1, num_tiles=1 << 20) == 109


def test_tiles_fit_the_shared_memory() -> None:
    for shared_memory in (84 << 10, 148 << 10, 212 << 10):
        for width in (64, 128, 256):
            for dtype, item_size in ((torch.bfloat16, 2), (torch.float16, 4), (torch.float32, 4)):
                for page_size in (0, 16, 64):
                    device = Device(132, shared_memory)
                    token_bytes = 2 * width * item_size
                    sizes = ((width, width), dtype, item_size, token_bytes, page_size)
                    for is_prefill in (False, True):
                        tiles = tiling(device, 4096, *sizes, is_prefill=is_prefill)
                        buffers = tiles.num_stages // 2 if page_size else tiles.num_stages - 1
                        assert buffers >= 1
                        assert buffers * tiles.block_n * token_bytes <= shared_memory
                        assert page_size != 64 or 64 % tiles.block_n == 0


def test_equal_inputs_are_uploaded_once(device: torch.device) -> None:
    layout = Layout(9, table=torch.tensor([[1, 2]]), spans=((0, 8), (0, 1)))
    visibility = Visibility(9, (0,))
    inputs = device_inputs(layout, visibility, device)
    equal = Layout(9, table=torch.tensor([[1, 2]]), spans=((0, 8), (0, 1)))
    assert device_inputs(equal, Visibility(9, (0,)), device).meta is inputs.meta
    for other in (
        dataclasses.replace(layout, table=torch.tensor([[1, 3]])),
        dataclasses.replace(layout, spans=((1, 8), (0, 2))),
        dataclasses.replace(layout, length=8),
        dataclasses.replace(layout, start=1),
    ):
        assert device_inputs(other, visibility, device).meta is not inputs.meta
    for change in ({"seen": 10}, {"pads": (1,)}, {"first": 1}, {"held_from": 1}, {"num_slots": 1}, {"sinks": 1}):
        assert device_inputs(layout, dataclasses.replace(visibility, **change), device).meta is not inputs.meta
    assert device_inputs(layout, None, device).meta is not inputs.meta
    bounds = torch.zeros(1, 1, dtype=torch.long, device=device)
    bounded = device_inputs(layout, dataclasses.replace(visibility, bounds=bounds), device)
    assert bounded.meta is inputs.meta
    assert bounded.bounds is bounds
    # A table that is written to is another one.
    layout.table[0, 0] = 5
    assert device_inputs(layout, visibility, device).meta[-2:].tolist() == [5, 2]


def test_inputs_keep_their_storages_and_say_what_does_not_fit(device: torch.device) -> None:
    layout = Layout(9, table=torch.tensor([[1, 2]]), spans=((0, 8), (0, 1)))
    bounds, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 1, 2, 9, dtype=torch.bool)
    plain = Visibility(9, (0,))
    bounded, masked = (dataclasses.replace(plain, **change) for change in ({"bounds": bounds}, {"mask": mask}))
    inputs = DeviceInputs.allocate(layout, plain, device, columns=3)
    before = inputs.meta.data_ptr()
    inputs.update(Layout(17, table=torch.tensor([[1, 2, 0]]), spans=((0, 8), (0, 8), (0, 1))), Visibility(17, (4,)))
    assert inputs.meta.data_ptr() == before
    # pads, lows, highs, begins, table
    assert inputs.meta[16:].tolist() == [4, 0, 0, 0, 8, 8, 1, 0, 8, 16, 1, 2, 0]
    wide = Layout(9, table=torch.zeros(1, 4, dtype=torch.long), spans=((0, 8), (0, 1)))
    for wrong, message in (
        ((wide, plain), "4 columns, with room for 3"),
        ((Layout(9), plain), "contiguous"),
        ((layout, Visibility(9, (0, 0))), "2 rows, with room for 1"),
        ((layout, bounded), "bounds must be given at every step or at none"),
        ((layout, masked), "mask must be given at every step or at none"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs.update(*wrong)
    inputs = DeviceInputs.allocate(Layout(9), bounded, device)
    with pytest.raises(ValueError, match="bounds"):
        inputs.update(Layout(9), dataclasses.replace(plain, bounds=bounds[:, :1]))
    inputs = DeviceInputs.allocate(Layout(9), masked, device, tokens=10)
    inputs.update(Layout(10), dataclasses.replace(plain, mask=torch.ones(1, 1, 2, 10, dtype=torch.bool)))
    with pytest.raises(ValueError, match="mask"):
        inputs.update(Layout(11), dataclasses.replace(plain, mask=torch.ones(1, 1, 2, 11, dtype=torch.bool)))


def test_reasons_not_to_use_triton() -> None:
    cpu = torch.device("cpu")
    assert "NVIDIA" in str(unsupported(cpu, torch.bfloat16))
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        assert unsupported(gpu, torch.bfloat16, ("int8",), (128,), Scoring(1.0)) is None
        assert "float64" in str(unsupported(gpu, torch.float64))
        assert "512" in str(unsupported(gpu, torch.bfloat16, ("int8",), (128, 512)))
        assert "weights" in str(unsupported(gpu, torch.bfloat16, scoring=Scoring(1.0, weights=True)))
