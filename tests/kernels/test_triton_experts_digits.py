"""int4 experts times digits of x: exact products of bytes, and rows that digits could lose something of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hfkv.kernels.experts import triton as triton_experts
from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.naive import expert_linear_naive
from hfkv.kernels.experts.slots import ExpertSlots
from hfkv.kernels.experts.triton import expert_linear
from tests.kernels.expert_cases import assert_close, choose, stack
from tests.kernels.triton_dots import dots_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of the interpreter, about NaN
# Without a GPU the instruction cannot run; what stands in for it is held against the same numbers.
HAS_ASSEMBLY = [False, True] if torch.cuda.is_available() else [False]


@pytest.mark.parametrize("has_assembly", HAS_ASSEMBLY)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_products_of_bytes_are_exact(dtype: torch.dtype, has_assembly: bool, device: torch.device) -> None:
    a = torch.randint(0, 256, (64, 4), dtype=torch.uint8)
    b = torch.randint(0, 256, (64, 4), dtype=torch.uint8).view(dtype)
    a[:2], b[0] = 255, torch.iinfo(dtype).min
    b[1] = torch.iinfo(dtype).max
    words = [x.view(torch.int32).flatten().to(device) for x in (a, b)]
    out = torch.empty(64, dtype=torch.int32, device=device)
    dots_kernel[(1,)](*words, out, dtype == torch.int8, has_assembly, 64)
    assert torch.equal(out.cpu().long(), 7 + (a.long() * b.long()).sum(1))


def layer(x: torch.Tensor, codes: Codes, slots: ExpertSlots) -> torch.Tensor:
    return expert_linear(x, (codes,), slots, codes.num_rows, rows_are_slots=False, kernel="gemv")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_a_number_far_beyond_the_others(size: float, dtype: torch.dtype, device: torch.device) -> None:
    (codes,), slots = stack("int4", (3, 20, 100), dtype, device), choose(2, 2, 3, device)
    x = torch.randn(2, 100, device=device).mul(size).to(dtype)
    x[0, 5] *= 50
    x[1, 32:64] = 0
    x[1, 70] = 60_000
    assert_close(layer(x, codes, slots), x, (codes,), slots, 20, rows_are_slots=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float, device: torch.device) -> None:
    (codes,), slots = stack("int4", (2, 20, 64), torch.bfloat16, device), choose(2, 1, 2, device)
    x = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    fine = layer(x, codes, slots)
    x[0, 9] = bad
    out = layer(x, codes, slots)
    assert not out[0].isfinite().any()
    assert torch.equal(out[1], fine[1])


def test_rows_that_are_not_aligned_are_read_as_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (codes,), slots = stack("int4", (3, 20, 96), torch.bfloat16, device), choose(2, 2, 3, device)
    x = torch.randn(2, 96, device=device, dtype=torch.bfloat16)
    wide = torch.zeros(3, 20, 57, dtype=torch.uint8, device=device)
    wide[..., 1:49] = codes.weight
    read = []
    codec_of = triton_experts._gemv_codec
    monkeypatch.setattr(triton_experts, "_gemv_codec", lambda *args: read.append(codec_of(*args)) or read[-1])
    for weight in (codes.weight, wide[..., 1:49]):
        assert_close(layer(x, replace(codes, weight=weight), slots), x, (codes,), slots, 20, rows_are_slots=False)
    # Exact products of floats, for a row of them.
    exact = expert_linear_naive(x.double(), (codes,), slots, 20, rows_are_slots=False, dtype=torch.float64)
    torch.testing.assert_close(layer(x.float(), codes, slots).double(), exact, rtol=1e-5, atol=1e-5)
    assert read == ["words", "int4", "int4"]
