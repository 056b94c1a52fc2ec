"""Products with experts as they are stored, in C++: what the decoded matrices give, whatever the shape and the rows."""

from __future__ import annotations

import pytest
import torch

from hfkv.kernels.native.experts import expert_numbers, expert_products
from hfkv.kernels.native.library import library, why_not
from tests.kernels.stored_experts import EXPERT_CODECS, check_products, stored

pytestmark = pytest.mark.skipif(library() is None, reason=why_not() or "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", EXPERT_CODECS)
def test_native_products_are_those_of_what_is_stored(codec: str, dtype: torch.dtype) -> None:
    if codec == "plain" and dtype == torch.float16:
        pytest.skip("plain fp16 experts are torch's")
    # Multiples of nothing, of groups, and of blocks; rows below and above every number that goes together.
    for shape in ((7, 5), (33, 17), (70, 90), (64, 96)):
        for num_rows in (1, 2, 3, 5, 7, 100):
            check_products(codec, shape, num_rows, dtype)


@pytest.mark.parametrize("codec", EXPERT_CODECS)
def test_native_threads_change_no_bit(codec: str) -> None:
    planes, _ = stored(codec, (200, 96), torch.float32)
    x = torch.randn(9, 96)
    results = []
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(torch.empty(9, 200))
        expert_products(x, results[-1], 1, **planes)
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_native_kernels_refuse_what_does_not_go_together() -> None:
    planes, _ = stored("int8", (64, 96), torch.float32)
    for x, out, expert in (
        (torch.randn(2, 95), torch.empty(2, 64), 0),
        (torch.randn(2, 96), torch.empty(2, 60), 0),
        (torch.randn(2, 96), torch.empty(2, 65), 0),  # an output that nobody computes
        (torch.randn(2, 96), torch.empty(2, 64), 2),
        (torch.randn(2, 96), torch.empty(3, 64), 0),
        (torch.randn(2, 96), torch.empty(2, 64).bfloat16(), 0),
    ):
        with pytest.raises(ValueError, match=r"is no matrix of|does not go into"):
            expert_products(x, out, expert, **planes)
    with pytest.raises(ValueError, match="where a contiguous"):
        expert_products(torch.randn(2, 96), torch.empty(2, 64), 0, planes["weight"], planes["scale"][:, :32])
    with pytest.raises(ValueError, match="contiguous fp32 or bf16"):
        expert_numbers(torch.empty(64, 96).half(), 0, **planes)
