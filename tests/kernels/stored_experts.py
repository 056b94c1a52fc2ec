"""Experts' matrices as they are stored, and products with them held against what they stand for."""

from __future__ import annotations

from typing import Any

import torch

from hfkv.kernels.experts.codes import GROUP
from hfkv.kernels.native.experts import expert_numbers, expert_products
from tests.kernels.guarded import guarded

EXPERT_CODECS = ("plain", "int8", "int4")
NUM_EXPERTS = 2


def stored(codec: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
    """Planes of random codes, at the end of what may be read, and the numbers `[E, N, K]` that they stand for."""
    outputs, inputs = shape
    if codec == "plain":
        matrices = torch.randn(NUM_EXPERTS, outputs, inputs).to(dtype)
        return {"weight": guarded(matrices)}, matrices.double()
    if codec == "int8":
        codes = torch.randint(-127, 128, (NUM_EXPERTS, outputs, inputs), dtype=torch.int8)
        scale = torch.rand(NUM_EXPERTS, outputs)
        return {"weight": guarded(codes), "scale": guarded(scale)}, codes.double() * scale[..., None].double()
    padded = -(-inputs // GROUP) * GROUP
    codes = torch.randint(0, 256, (NUM_EXPERTS, outputs, padded // 2), dtype=torch.uint8)
    groups = torch.randint(-127, 128, (NUM_EXPERTS, padded // GROUP, outputs, 2), dtype=torch.int8)
    units = torch.rand(NUM_EXPERTS, outputs, 2).bfloat16()
    halves = codes.view(NUM_EXPERTS, outputs, -1, 1, GROUP // 2)
    levels = torch.cat([halves & 15, halves >> 4], dim=3).flatten(3).double() - 8
    step, centre = (groups.transpose(1, 2).double() * units[:, :, None].double()).split(1, dim=3)
    planes = {"weight": guarded(codes), "groups": guarded(groups), "units": guarded(units)}
    return planes, (levels * step + centre).flatten(2)[..., :inputs]


def check_products(codec: str, shape: tuple[int, int], num_rows: int, dtype: torch.dtype) -> None:
    """Asserts that products, and decoded numbers, are those of what is stored."""
    planes, numbers = stored(codec, shape, torch.float32 if dtype == torch.float16 else dtype)
    outputs, inputs = shape
    x = guarded(torch.randn(num_rows, inputs).to(dtype))
    # Some columns are another part's.
    columns = torch.randperm(outputs + 3)[:outputs].to(torch.int16).expand(NUM_EXPERTS, -1).contiguous()
    for expert in range(NUM_EXPERTS):
        for some in (None, columns):
            width = outputs if some is None else outputs + 3
            places = torch.arange(outputs) if some is None else some[expert].long()
            out = guarded(torch.full((num_rows, width), torch.nan, dtype=dtype))
            expert_products(x, out, expert, **planes, columns=some)
            expected = x.double() @ numbers[expert].t()
            allowed = (2e-6 if dtype == torch.float32 else 6e-3) * expected.norm()
            assert (out[:, places].double() - expected).norm() <= allowed
            assert out.isnan().sum() == num_rows * (width - outputs)
            if codec != "plain" and dtype != torch.float16:
                decoded = guarded(torch.full((width, inputs), torch.nan, dtype=dtype))
                expert_numbers(decoded, expert, **planes, columns=some)
                largest = numbers[expert].abs().max()
                limit = (2**-22 if dtype == torch.float32 else 2**-8) * largest
                assert (decoded[places].double() - numbers[expert]).abs().max() <= limit
