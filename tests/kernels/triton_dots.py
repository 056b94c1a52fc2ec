"""A kernel that stores what `dot4` gives, in a file of its own to be imported with the interpreted Triton."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

import triton
import triton.language as tl

from hfkv.kernels.experts.triton_digits import dot4


@triton.jit
def dots_kernel(a_ptr, b_ptr, out_ptr, IS_SIGNED: tl.constexpr, HAS_ASSEMBLY: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    total = tl.full([SIZE], 7, tl.int32)
    dots = dot4(total, tl.load(a_ptr + at), tl.load(b_ptr + at), IS_SIGNED, HAS_ASSEMBLY)
    tl.store(out_ptr + at, dots)
