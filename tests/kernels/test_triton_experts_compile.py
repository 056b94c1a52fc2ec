"""The experts' kernels compile for GPUs, and fit their shared memory, on a machine without one."""

from pathlib import Path

import pytest

from tests.kernels.expert_cases import FORMS
from tests.kernels.test_triton_compiles import EXTENTS, check

FEW = ("90 gemv mixed bfloat16 1 768 bias combine", "90 gemm int4 bfloat16 32 768")
# Rows an expert: few, so that tiles are of 16; some, so that they are of 32 and 64; many, and of 128.
SHAPES = (
    ("gemv", "bfloat16", 1, 768),
    ("gemv", "float32", 3, 100),
    ("gemm", "bfloat16", 32, 768),
    ("gemm", "float16", 80, 768),
    ("gemm", "bfloat16", 160, 100),
    ("gemm", "bfloat16", 512, 2048),
    ("gemm", "float32", 512, 100),
)


def test_kernels_compile(tmp_path: Path) -> None:
    check(FEW, tmp_path)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_kind_of_kernel_compiles(capability: int, form: str, extent: dict[int, slice], tmp_path: Path) -> None:
    # Of two parts, the GEMM's are compiled on their own.
    shapes = SHAPES[:2] if form == "mixed" else SHAPES[extent.get(capability, slice(None))]
    kernels = (f"{kernel} {form} {dtype} {tokens} {inputs}" for kernel, dtype, tokens, inputs in shapes)
    check(tuple(f"{capability} {kernel} bias combine" for kernel in kernels), tmp_path)
