"""Kernels compile for GPUs, and fit their shared memory, on a machine without one."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfkv.kernels.triton.bits.parts import BITS

ROOT = Path(__file__).parent.parent.parent
FEW = (
    "90 append int4 fp8 bfloat16 128 64",
    "90 decode int4 int8 bfloat16 128 64 scoring bounds",
    "80 prefill none int4 float16 96 0 mask",
    "80 decode int4 int8 bfloat16 128 16 scoring bounds transposed",
)
SHAPES = (
    ("append", "float32", 80, 0),
    ("decode", "bfloat16", 128, 0),
    ("decode", "float16", 256, 64),
    ("decode", "float32", 256, 10),
    ("prefill", "bfloat16", 128, 64),
    ("prefill", "float16", 128, 64),
    ("prefill", "bfloat16", 256, 0),
    ("prefill", "float32", 256, 64),
)
# The slow run compiles each shape once, for 8.0 or 9.0, and for 8.9, which has the least memory, and 10.0 one each; all
# of them for all take some ten minutes: `.ci/run compile`.
SOME = {80: slice(0, None, 2), 89: slice(2, None, 8), 90: slice(1, None, 2), 100: slice(3, None, 8)}
EXTENTS = [
    pytest.param(SOME, marks=pytest.mark.slow, id="some"),
    pytest.param({}, marks=pytest.mark.compile, id="all"),
]
# Whose values lie transposed: products of digits.
DIGITS = (("bfloat16", 256, 0), ("bfloat16", 96, 0), ("float16", 64, "16 few"), ("bfloat16", 128, 64))


def check(kernels: tuple[str, ...], cache: Path) -> None:
    """Asserts that `tests.kernels.compiling` compiles `kernels`, in a process that does not interpret them."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.compiling", *kernels]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bytes of shared memory") >= len(kernels)


def test_kernels_compile(tmp_path: Path) -> None:
    check(FEW, tmp_path)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("codec", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_every_kind_of_kernel_compiles(capability: int, codec: str, extent: dict[int, slice], tmp_path: Path) -> None:
    # The attention kernels of fp8 need 8.9.
    shapes = SHAPES[:1] if codec == "fp8" and capability < 89 else SHAPES
    shapes = shapes[extent.get(capability, slice(None))]
    kernels = (f"{operation} {codec} {codec} {dtype} {dim} {size}" for operation, dtype, dim, size in shapes)
    check(tuple(f"{capability} {kernel}" for kernel in kernels), tmp_path)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize(
    ("codec", "capability"),
    # 8-bit floats need 8.9.
    [*itertools.product(("int8", "int4"), (80, 89, 90, 100)), *(("fp8", capability) for capability in (89, 90, 100))],
)
def test_every_kind_of_kernel_of_digits_compiles(
    codec: str, capability: int, extent: dict[int, slice], tmp_path: Path
) -> None:
    # 8-bit floats begin at 8.9; the others are as they are for 8.0 there.
    shapes = DIGITS[:1] if capability == 89 and codec != "fp8" else DIGITS[extent.get(capability, slice(None))]
    kernels = (f"{capability} decode {codec} {codec} {dtype} {dim} {size} transposed" for dtype, dim, size in shapes)
    check(tuple(kernels), tmp_path)


@pytest.mark.compile
@pytest.mark.parametrize("codec", BITS)
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_every_kind_of_kernel_of_bits_compiles(capability: int, codec: str, tmp_path: Path) -> None:
    shapes = [
        (operation, dtype, dim, size) for operation, dtype, dim, size in SHAPES if dtype != "float32" or dim < 256
    ]
    kernels = [f"{operation} {codec} {codec} {dtype} {dim} {size}" for operation, dtype, dim, size in shapes]
    kernels += [f"decode {codec} {codec} {dtype} {dim} {size} transposed" for dtype, dim, size in DIGITS]
    kernels += [
        f"latent {codec} {codec} bfloat16 512 0",
        f"decode int8 {codec} bfloat16 128 16 scoring bounds transposed",
    ]
    check(tuple(f"{capability} {kernel}" for kernel in kernels), tmp_path)


@pytest.mark.slow
def test_kernels_of_bits_compile(tmp_path: Path) -> None:
    check(("90 append int3 int2 bfloat16 64 64",), tmp_path)


@pytest.mark.slow
def test_a_kernel_of_keys_less_their_mean_compiles(tmp_path: Path) -> None:
    check(("89 decode int4 int4 bfloat16 128 16 scoring bounds transposed mean",), tmp_path)
