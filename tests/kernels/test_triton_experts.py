"""`expert_linear`: the numbers of its naive twin, whatever the experts' form and whoever chooses them."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from hfkv.kernels.experts import triton as triton_experts
from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.slots import ExpertSlots
from hfkv.kernels.experts.triton import expert_linear
from hfkv.kernels.triton.tiling import LITTLE_SHARED_MEMORY, Device
from tests.kernels.expert_cases import FORMS, assert_close, choose, part, stack, to
from tests.kernels.held import sparse

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("gemv", "gemm")


def check(
    slots: ExpertSlots,
    form: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kernel: str | None,
    device: torch.device,
    *,
    has_bias: bool = False,
    rows_are_slots: bool = False,
) -> torch.Tensor:
    """Asserts that a layer of `[N, K]` is computed as well as torch computes it."""
    num_outputs, num_inputs = shape
    num_rows = slots.num_slots if rows_are_slots else slots.num_tokens
    x = torch.randn(num_rows, num_inputs).to(device, dtype)
    bias = torch.randn(slots.num_experts, num_outputs).to(device, dtype) if has_bias else None
    parts = stack(form, (slots.num_experts, *shape), dtype, device)
    args = parts, slots, num_outputs, bias
    out = expert_linear(x, *args, rows_are_slots=rows_are_slots, kernel=kernel)  # type: ignore[arg-type]
    assert_close(out, x, *args, rows_are_slots=rows_are_slots)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, kernel: str, dtype: torch.dtype, device: torch.device) -> None:
    is_half = dtype != torch.float32
    check(choose(3, 2, 3, device), form, (35, 77), dtype, kernel, device, has_bias=is_half, rows_are_slots=not is_half)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (70, 33), (3, 300), (130, 31), (48, 96)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", ["none", "int8", "int4"])
def test_odd_and_even_sizes(form: str, kernel: str, shape: tuple[int, int], device: torch.device) -> None:
    check(choose(2, 1, 2, device), form, shape, torch.bfloat16, kernel, device)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(0, 2, 3), (1, 1, 1), (1, 4, 8), (7, 2, 3), (7, 1, 8), (25, 4, 8)]
)
@pytest.mark.parametrize("kernel", [*KERNELS, None])
def test_tokens_and_experts(
    num_tokens: int, top_k: int, num_experts: int, kernel: str | None, device: torch.device
) -> None:
    if kernel == "gemv" and num_tokens == 25:
        kernel = None
    slots = choose(num_tokens, top_k, num_experts, device)
    out = check(slots, "mixed", (36, 40), torch.float32, kernel, device, has_bias=True)
    assert out.shape == (num_tokens * top_k, 36)


@pytest.mark.parametrize("rows_are_slots", [False, True])
def test_many_rows_of_one_expert(rows_are_slots: bool, device: torch.device) -> None:
    # 100 of 101 slots on expert 2 of 4: several tiles of it, and experts without any.
    index = torch.full((101, 1), 2)
    index[50] = 0
    slots = ExpertSlots(index.to(device), 4)
    check(slots, "int8", (20, 50), torch.bfloat16, "gemm", device, has_bias=True, rows_are_slots=rows_are_slots)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", ["none", "mixed"])
def test_slots_of_no_expert_are_zeros(form: str, kernel: str, device: torch.device) -> None:
    slots = ExpertSlots(torch.tensor([[0, 3], [3, 3], [9, 2], [-1, 2]], device=device), 3)
    out = check(slots, form, (35, 40), torch.bfloat16, kernel, device, has_bias=True)
    assert not out[[1, 2, 3, 4, 6]].any()
    assert out[[0, 5, 7]].any(dim=1).all()
    nobodys = ExpertSlots(torch.full((2, 2), 3, device=device), 3)
    assert not check(nobodys, form, (35, 40), torch.bfloat16, kernel, device, has_bias=True).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_expert_is_read_in_place_of_another(kernel: str, device: torch.device) -> None:
    weight = torch.full((5, 20, 40), torch.nan)
    weight[1::2] = torch.randn(2, 20, 40)
    x = torch.randn(3, 40)
    parts = (to(Codes(weight, None, None, None, None, 40), device),)
    slots = ExpertSlots(torch.tensor([[1, 3], [3, 1], [1, 5]], device=device), 5)
    assert_close(
        expert_linear(x.to(device), parts, slots, 20, rows_are_slots=False, kernel=kernel),  # type: ignore[arg-type]
        *(x.to(device), parts, slots, 20),
        rows_are_slots=False,
    )


@pytest.mark.parametrize("form", ["none", "transposed", "mixed"])
def test_inputs_cut_into_splits(form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # One slot and few outputs leave a GPU idle unless its inputs are shared out.
    monkeypatch.setattr(triton_experts, "device_of", lambda device: Device(9, LITTLE_SHARED_MEMORY))
    splits = []
    choose_splits = triton_experts.gemv_splits
    monkeypatch.setattr(triton_experts, "gemv_splits", lambda *args: splits.append(choose_splits(*args)) or splits[-1])
    slots = ExpertSlots(torch.tensor([[1, 2]], device=device), 2)
    out = check(slots, form, (4, 5000), torch.float16, "gemv", device, has_bias=True)
    assert not out[1].any()
    assert splits[0] > 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_any_strides(kernel: str, device: torch.device) -> None:
    x = torch.randn(80, 6, device=device).T[::2, ::2]  # [3, 40]
    stacked = torch.randn(40, 30, 2, device=device).permute(2, 1, 0)  # experts innermost
    bias = torch.randn(30, 2, device=device).T
    int8 = (stacked * 30).to(torch.int8)
    for codes in (
        Codes(stacked, None, None, None, None, 40),
        Codes(int8, torch.rand(2, 30, device=device), None, None, None, 40),
    ):
        args = x, (codes,), choose(3, 2, 2, device), 30, bias
        out = expert_linear(*args, rows_are_slots=False, kernel=kernel)  # type: ignore[arg-type]
        assert_close(out, *args, rows_are_slots=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_three_parts_and_an_empty_one(kernel: str, device: torch.device) -> None:
    columns = torch.randperm(30).int().expand(2, 30)
    parts = [
        part(codec, (2, high - low, 40), torch.float32, columns[:, low:high].contiguous())
        for codec, low, high in (("none", 0, 9), ("int8", 9, 9), ("int4", 9, 20), ("transposed", 20, 30))
    ]
    args = torch.randn(3, 40, device=device), tuple(to(codes, device) for codes in parts), choose(3, 1, 2, device), 30
    out = expert_linear(*args, rows_are_slots=False, kernel=kernel)  # type: ignore[arg-type]
    assert_close(out, *args, rows_are_slots=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_stacks_larger_than_32_bits_count(kernel: str, device: torch.device) -> None:
    weight = sparse((2, 16, 32), (1 << 31, 32, 1), device)
    weight[1] = torch.randint(-127, 128, (16, 32))
    codes = Codes(weight, torch.ones(2, 16, device=device), None, None, None, 32)
    x = torch.randn(1, 32, device=device)
    slots = ExpertSlots(torch.ones(1, 1, dtype=torch.long, device=device), 2)
    out = expert_linear(x, (codes,), slots, 16, rows_are_slots=False, kernel=kernel)  # type: ignore[arg-type]
    torch.testing.assert_close(out, x @ weight[1].float().T, rtol=1e-5, atol=1e-3)


def test_the_kernel_is_chosen_by_the_number_of_slots(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for kernel in KERNELS:
        launch = getattr(triton_experts, f"_{kernel}")

        def spied(*args: object, kernel: str = kernel, launch=launch) -> torch.Tensor:
            used.append(kernel)
            return launch(*args)

        monkeypatch.setattr(triton_experts, f"_{kernel}", spied)
    for num_tokens, top_k, num_experts in ((1, 4, 8), (2, 1, 8), (3, 1, 8), (2, 4, 8)):
        check(choose(num_tokens, top_k, num_experts, device), "none", (8, 16), torch.float32, None, device)
    assert used == ["gemv", "gemv", "gemm", "gemm"]


@pytest.mark.parametrize("form", ["none", "mixed"])
def test_invariant_bits_do_not_depend_on_other_rows(form: str, device: torch.device) -> None:
    parts = stack(form, (2, 40, 90), torch.bfloat16, device)
    x = torch.randn(60, 90).to(device, torch.bfloat16)
    index = torch.randint(0, 2, (60, 1), device=device)
    whole = expert_linear(x, parts, ExpertSlots(index, 2), 40, rows_are_slots=False, kernel="invariant")
    for low, high in ((0, 1), (1, 8), (8, 60)):
        some = ExpertSlots(index[low:high], 2)
        out = expert_linear(x[low:high], parts, some, 40, rows_are_slots=False, kernel="invariant")
        assert torch.equal(out, whole[low:high])


def test_slots_are_tiled_once_for_both_layers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    tile = triton_experts.tile_slots
    monkeypatch.setattr(triton_experts, "tile_slots", lambda *args: calls.append(args) or tile(*args))
    slots = choose(7, 2, 3, device)
    for rows_are_slots in (False, True):
        check(slots, "none", (8, 16), torch.float32, "gemm", device, rows_are_slots=rows_are_slots)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_operator_keeps_torchs_contract(kernel: str, device: torch.device) -> None:
    slots = choose(3, 2, 3, device)
    parts = stack("mixed", (3, 20, 40), torch.float32, device)
    order, tiles = slots.tiles(16, triton_experts.tile_slots) if kernel == "gemm" else (None, None)
    args = [
        *(torch.randn(3, 40, device=device), slots.experts, order, tiles, 16, [codes.weight for codes in parts]),
        [codes.rows if codes.scale is None else codes.scale for codes in parts],
        *([codes.groups for codes in parts], [codes.columns for codes in parts]),
        *(torch.randn(3, 20, device=device), 40, 20, 2),
    ]
    opcheck(torch.ops.hfkv.expert_linear.default, tuple(args))


@pytest.mark.filterwarnings("ignore")
def test_it_compiles_as_one_graph(device: torch.device) -> None:
    parts = stack("none", (4, 12, 16), torch.float32, device)
    back = stack("int8", (4, 16, 12), torch.float32, device)

    def experts(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        slots = ExpertSlots(index, 4)
        y = expert_linear(x, parts, slots, 12, rows_are_slots=False)
        return expert_linear(y.relu(), back, slots, 16, rows_are_slots=True)

    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    for num_tokens in (1, 3, 4):
        x, index = torch.randn(num_tokens, 16, device=device), choose(num_tokens, 2, 4, device).experts
        args = x, index.view(num_tokens, 2)
        assert torch.equal(compiled(*args), experts(*args))


def test_gradients_are_refused(device: torch.device) -> None:
    parts = stack("none", (2, 8, 16), torch.float32, device)
    x = torch.randn(1, 16, device=device, requires_grad=True)
    out = expert_linear(x, parts, choose(1, 1, 2, device), 8, rows_are_slots=False)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
