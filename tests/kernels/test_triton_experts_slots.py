"""ExpertSlots sorted and tiled as their naive twin does it, weighted sums, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from hfkv.kernels.experts import slots as expert_slots
from hfkv.kernels.experts import triton_slots as triton_experts_slots
from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.naive import combine_naive, decode_naive, expert_linear_naive
from hfkv.kernels.experts.slots import ExpertSlots, num_tiles
from hfkv.kernels.experts.triton import expert_linear
from hfkv.kernels.experts.triton_combine import combine
from hfkv.kernels.experts.triton_slots import tile_slots
from hfkv.kernels.experts.triton_tiling import choose_block_m, gemm_tiling, gemv_splits, gemv_tiling
from hfkv.kernels.triton.tiling import Device
from tests.kernels.expert_cases import CODECS, choose, part, stack

H200 = Device(132, 212 << 10)


def ids(kind: str, num_slots: int, num_experts: int) -> torch.Tensor:
    if kind == "one":
        return torch.full((num_slots,), num_experts - 1)
    # Half as many again as there are experts: some are nobody's, before and behind.
    spread = 0 if kind == "experts" else max(1, num_experts // 4)
    return torch.randint(-spread, num_experts + spread, (num_slots,))


@pytest.mark.parametrize("kind", ["experts", "one", "sentinels"])
@pytest.mark.parametrize(
    ("num_slots", "num_experts", "block_m"), [(0, 3, 16), (1, 1, 16), (14, 8, 16), (100, 3, 16), (100, 5, 32)]
)
def test_tiles(kind: str, num_slots: int, num_experts: int, block_m: int, device: torch.device) -> None:
    experts = ids(kind, num_slots, num_experts)
    order, tiles = expert_slots.tile_slots(experts, num_experts, block_m)
    assert sorted(order.tolist()) == list(range(num_slots))
    assert len(tiles) == num_tiles(num_slots, num_experts, block_m)
    seen = []
    for expert, low, high in tiles[tiles[:, 0] >= 0].tolist():
        assert 0 < high - low <= block_m
        for slot in order[low:high].tolist():
            one = experts[slot].item()
            assert (one if 0 <= one < num_experts else num_experts) == expert
            seen.append((expert, slot))
    assert seen == sorted(seen)
    assert len(seen) == num_slots
    for expected, got in zip((order, tiles), tile_slots(experts.to(device), num_experts, block_m), strict=True):
        assert torch.equal(expected, got.cpu())


def test_more_slots_than_a_program_looks_at_together(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts_slots, "BLOCK_S", 32)
    monkeypatch.setattr(triton_experts_slots, "BLOCK_T", 2)
    experts = ids("sentinels", 150, 3)
    expected = expert_slots.tile_slots(experts, 3, 16)
    for one, other in zip(expected, tile_slots(experts.to(device), 3, 16), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.filterwarnings("ignore")
def test_the_operators_keep_torchs_contract(device: torch.device) -> None:
    opcheck(torch.ops.hfkv.tile_slots.default, (torch.tensor([2, 0, 1, 2], device=device), 3, 16))
    y, weights = torch.randn(6, 8, device=device), torch.rand(3, 2, device=device)
    opcheck(torch.ops.hfkv.combine_slots.default, (y, weights, torch.bfloat16))


def test_order_and_offsets(device: torch.device) -> None:
    slots = ExpertSlots(torch.tensor([[2, 0], [4, 2], [0, 2]], device=device), 4)
    assert slots.order.tolist() == [1, 4, 0, 3, 5, 2]
    assert slots.offsets.tolist() == [0, 2, 2, 5, 5]
    assert slots.offsets.dtype == torch.int32
    assert (slots.num_slots, slots.num_tokens, slots.top_k) == (6, 3, 2)
    strided = torch.arange(12, device=device).view(3, 4)[:, 1:2]
    assert ExpertSlots(strided, 12).experts.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(0, 2, 8), (1, 4, 700), (3, 1, 33), (7, 3, 64)])
def test_combine(num_tokens: int, top_k: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    y = torch.randn(num_tokens * top_k, width, device=device).to(dtype)
    weights = torch.rand(top_k, num_tokens, device=device).T
    for weights_dtype in (dtype, torch.float32):
        got, expected = combine(y, weights.to(weights_dtype), dtype), combine_naive(y, weights.to(weights_dtype), dtype)
        torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_combine_refuses_other_slots(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"\[5, 8\] slots for weights \[3, 2\]"):
        combine(torch.zeros(5, 8, device=device), torch.zeros(3, 2, device=device), torch.float32)


@pytest.mark.parametrize("num_inputs", [1, 31, 32, 77])
def test_decoding_number_by_number(num_inputs: int) -> None:
    codes = {codec: part(codec, (2, 3, num_inputs), torch.float32) for codec in CODECS}
    decoded = {codec: decode_naive(codes[codec], 1) for codec in CODECS}
    assert torch.equal(decoded["none"], codes["none"].weight[1])
    for n in range(3):
        for k in range(num_inputs):
            one = codes["int8"]
            assert one.scale is not None
            assert decoded["int8"][n, k] == one.weight[1, n, k].item() * one.scale[1, n]
            one = codes["int4"]
            assert one.groups is not None
            assert one.rows is not None
            g, j = divmod(k, 32)
            byte = int(one.weight[1, n, 16 * g + j % 16])
            step, centre = one.groups[1, g, n] * one.rows[1, n]
            assert decoded["int4"][n, k] == ((byte >> 4 if j >= 16 else byte & 15) - 8) * step + centre


@pytest.mark.parametrize("rows_are_slots", [False, True])
def test_the_naive_layer_slot_by_slot(rows_are_slots: bool) -> None:
    cpu = torch.device("cpu")
    parts = stack("mixed", (3, 20, 33), torch.float32, cpu)
    slots = ExpertSlots(torch.tensor([[0, 2], [3, 0], [2, 0]]), 3)
    x, bias = torch.randn(6 if rows_are_slots else 3, 33), torch.randn(3, 20)
    out = expert_linear_naive(x, parts, slots, 20, bias, rows_are_slots=rows_are_slots)
    for slot, expert in enumerate(slots.experts.tolist()):
        expected = torch.zeros(20)
        if expert < 3:
            for codes in parts:
                assert codes.columns is not None
                expected[codes.columns[expert].long()] = (
                    decode_naive(codes, expert) @ x[slot if rows_are_slots else slot // 2]
                )
            expected += bias[expert]
        torch.testing.assert_close(out[slot], expected)


@pytest.mark.parametrize("change", ["scale", "groups", "rows", "columns", "weight", "num_inputs"])
def test_codes_that_do_not_belong_together_are_refused(change: str) -> None:
    codes = part("int4", (2, 3, 40), torch.float32, torch.zeros(2, 3, dtype=torch.int32))
    wrong: dict[str, object] = {
        "scale": torch.ones(2, 3),
        "groups": None,
        "rows": torch.ones(2, 2, 3).transpose(1, 2),
        "columns": torch.zeros(2, 3, dtype=torch.long),
        "weight": codes.weight[:, :, ::2].repeat(1, 1, 2).transpose(1, 2).contiguous().transpose(1, 2),
        "num_inputs": 65,
    }
    with pytest.raises(ValueError, match=r"scale|groups|rows|columns|side by side|weights of 65 inputs"):
        replace(codes, **{change: wrong[change]})  # type: ignore[arg-type]


def test_layers_that_do_not_belong_together_are_refused(device: torch.device) -> None:
    slots = choose(3, 2, 2, device)
    (codes,) = stack("none", (2, 8, 16), torch.float32, device)
    x = torch.zeros(3, 16, device=device)
    refused = [
        ("of which the parts compute", x, (codes,), 9, None, False),
        ("of which the parts compute", x, (), 8, None, False),
        ("does not say which outputs", x, (codes, codes), 16, None, False),
        ("3 matrices|2 matrices", x, (Codes(codes.weight[:1], None, None, None, None, 16),), 8, None, False),
        (r"x \[3, 16\], where \[6, 16\]", x, (codes,), 8, None, True),
        ("another dtype", x.half(), (codes,), 8, None, False),
        ("a bias", x, (codes,), 8, x[:2], False),
    ]
    for match, rows, parts, num_outputs, bias, rows_are_slots in refused:
        for linear in (expert_linear, expert_linear_naive):
            with pytest.raises(ValueError, match=match):
                linear(rows, parts, slots, num_outputs, bias, rows_are_slots=rows_are_slots)  # type: ignore[arg-type]


def test_tile_sizes_of_a_large_layer() -> None:
    # Qwen3-30B-A3B, 128 experts, 8 of them a token, at batch 1, 32, 128 and in a prefill.
    assert [choose_block_m(8 * tokens, 128) for tokens in (1, 32, 128, 256, 4096)] == [*(16, 16, 16, 32, 128)]
    assert gemv_splits(H200, 8 * 96, 8) == 1
    assert gemv_splits(H200, 8, 8) == 4
    for codec, width, item_size in (("none", 768, 2), ("int8", 768, 1), ("int4", 384, 1)):
        tiling = gemv_tiling(H200, 8, 2048, width, item_size, is_transposed=False)
        assert width % tiling.block_k == 0  # nothing of a load is masked away
        assert 8 * 2048 // tiling.block_n >= 4 * 132
        assert gemm_tiling(H200, 16, codec, torch.bfloat16).num_stages >= 3
