"""The guarded int8 product is exact at every shape, and refuses what it is not for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hfkv.kernels.cpu.int8_matmul import MAX_INNER, from_digits, int8_matmul, is_exact, to_digits

# In a process of its own: torch's int8 products have crashed at odd shapes.
EVERY_SHAPE = """
import torch
from hfkv.kernels.cpu.int8_matmul import int8_matmul
torch.manual_seed(0)
for t in [*range(1, 130), 255, 1000]:
    for m in range(1, 34):
        for inner, width, other in ((64, t, 'keys'), (t, 64, 'values')):
            a = torch.randint(-128, 128, (m, inner), dtype=torch.int8)
            b = torch.randint(-128, 128, (inner, width), dtype=torch.int8)
            if other == 'keys':
                b = b.t().contiguous().t()
            out = int8_matmul(a, b, torch.full((m, width), 7, dtype=torch.int32))
            expected = (a.double() @ b.double()).int()
            assert torch.equal(out, expected), (m, inner, width)
"""


@pytest.mark.skipif(not is_exact(), reason="this processor's int8 products are not exact, and not used")
def test_every_shape_is_exact() -> None:
    done = subprocess.run([sys.executable, "-c", EVERY_SHAPE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_longest_sum_does_not_overflow() -> None:
    a = torch.full((1, MAX_INNER), -128, dtype=torch.int8)
    out = int8_matmul(a, a.t(), torch.empty(1, 1, dtype=torch.int32))
    assert out.item() == MAX_INNER * 128 * 128


def test_nothing_to_add_up_is_zero() -> None:
    a, b = torch.empty(2, 0, dtype=torch.int8), torch.empty(0, 3, dtype=torch.int8)
    assert torch.equal(int8_matmul(a, b, torch.ones(2, 3, dtype=torch.int32)), torch.zeros(2, 3, dtype=torch.int32))


def test_what_it_is_not_for() -> None:
    a = torch.ones(2, 4, dtype=torch.int8)
    out = torch.empty(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="int8, int8 and int32"):
        int8_matmul(a.float(), a.t(), out)
    with pytest.raises(ValueError, match=r"\[M, K\], \[K, N\]"):
        int8_matmul(a, a, out)
    with pytest.raises(ValueError, match="contiguous"):
        int8_matmul(a, a.t(), torch.empty(2, 4, dtype=torch.int32)[:, ::2])
    long = torch.ones(1, MAX_INNER + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="K <="):
        int8_matmul(long, long.t(), torch.empty(1, 1, dtype=torch.int32))


@pytest.mark.parametrize(("count", "error"), [(3, 2**-21), (4, 2**-23)])
@pytest.mark.parametrize("spread", [1.0, 1e-28, 1e30])
def test_digits_are_as_good_as_float32(spread: float, count: int, error: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64) * spread
    digits, scale = to_digits(x.clone(), count)
    assert digits.dtype == torch.int8
    back = from_digits(digits.int()) * scale
    assert ((back - x).abs() <= x.abs().amax(-1, keepdim=True) * error).all()


def test_a_small_number_beside_a_large_one_is_kept_by_four_digits() -> None:
    x = torch.tensor([[1.0, 2**-26]])
    digits, scale = to_digits(x.clone(), 4)
    assert (from_digits(digits.int()) * scale)[0, 1] == pytest.approx(2**-26, rel=0.1)


@pytest.mark.parametrize(("isa", "expected"), [("AVX2", "False"), ("DEFAULT", "True")])
def test_a_processor_without_exact_products_is_found_out(isa: str, expected: str) -> None:
    code = (
        "import torch; from hfkv.kernels.cpu.int8_matmul import is_exact;"
        "from hfkv.kernels.dispatch import attention_kernel;"
        "print(is_exact(), attention_kernel('int8', torch.float32, torch.device('cpu'), 1, (64, 64)).name)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "HFKV_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    said, kernel = done.stdout.split(maxsplit=1)
    if isa == "DEFAULT" and said == "False":
        pytest.skip("this processor has no exact int8 product at all")
    assert said == expected
    assert kernel.strip() == ("cpu decode" if said == "True" else "cpu flash")


def test_an_inner_dimension_of_one() -> None:
    a = torch.randint(-128, 128, (3, 1), dtype=torch.int8)
    b = torch.randint(-128, 128, (64, 1), dtype=torch.int8).as_strided((1, 64), (1, 1))
    out = int8_matmul(a, b, torch.empty(3, 64, dtype=torch.int32))
    assert torch.equal(out, a.int() * b.int())


def test_digits_of_zeros_and_of_what_is_no_number() -> None:
    digits, scale = to_digits(torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0]]), 3)
    back = from_digits(digits.int()) * scale
    assert (back[0] == 0).all()
    assert back[1:].isnan().all()
