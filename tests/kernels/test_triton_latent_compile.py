"""The kernels of latents compile for GPUs, and fit their shared memory, on a machine without one."""

from pathlib import Path

import pytest

from tests.kernels.test_triton_compiles import check

# DeepSeek's latents of 512 dimensions, contiguous and in pages, for 128 heads.
FEW = ("90 latent none none bfloat16 512 64 bounds", "80 latent int8 int8 bfloat16 512 0 scoring")
# What else they are compiled for, each once: compiling takes most of a minute.
MORE = (
    "80 latent none none float32 512 64",
    "89 latent fp8 fp8 bfloat16 512 0 bounds",
    "90 latent int4 int4 bfloat16 512 64 scoring",
    "90 latent int8 int8 float16 512 10 mask",
    "90 latent-append int8 int8 bfloat16 512 64",
)


def test_kernels_compile(tmp_path: Path) -> None:
    check(FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", MORE)
def test_other_kinds_of_kernels_compile(kernel: str, tmp_path: Path) -> None:
    check((kernel,), tmp_path)
