"""Budgets of the GPU kernels: how many bytes of what is held one warp instruction has to pay for.

A GPU that reads 4.3 TB/s and issues 463e9 warp instructions a second (an H200) needs 8.4 bytes an instruction to reach
90 % of its bandwidth; int4 at 2.8 times the speed of bf16 needs 6.9. Latents are read by many heads at once, so that
products decide there: they are only not to spill registers, and not to get worse. Layers of experts so small that tiles
are cut to keep a GPU busy (256 outputs of two slots) wait for memory whatever they issue, and have no budget.
"""

from __future__ import annotations

from itertools import product

# Codec -> bytes at head dim 128 and at 64; of 8-bit floats, which no tensor core multiplies as they are, none. Of int3
# and int2 what has been reached: their bits are first to become bytes, by one operation a number or by a table.
DECODE = {"none": (12.0, 9.0), "int8": (10.0, 7.0), "int4": (6.2, 4.0), "int3": (4.5, 3.3), "int2": (1.0, 0.8)}
EXPERTS = {"none": 12.0, "int8": 8.4, "int4": 6.5}
# Codec -> bytes of latents and rotary keys, of 512 and 64 dimensions; what has been reached.
LATENT = {"none": 8.5, "int8": 1.5}
WHOLE, BITS = ("none", "int8", "int4"), ("int3", "int2")

_DECODE = tuple(
    f"{capability} decode {codec} {codec} bfloat16 {dim} {page} groups:{groups}" + " transposed" * (codec != "none")
    for codec, dim, groups, page, capability in product((*WHOLE, "fp8"), (128, 64), (4, 8), (0, 64), (80, 90))
    # The attention kernels of fp8 need 8.9.
    if codec != "fp8" or capability > 80
)
# One token through the two layers of Qwen3-30B-A3B's experts.
_EXPERTS = tuple(
    f"{capability} gemv {codec} bfloat16 1 {inputs} outputs:{outputs} top:8"
    for codec, (inputs, outputs), capability in product(EXPERTS, ((2048, 1536), (768, 2048)), (80, 90))
)
# Many rows, and rows that end within a tile: compute bound, and only not to spill.
_EXPERTS += tuple(
    f"{capability} gemm {codec} bfloat16 {rows} bias"
    for codec, rows, capability in product(EXPERTS, ("160 100", "512 2048"), (80, 90))
)
_LATENT = tuple(
    f"{capability} latent {codec} {codec} bfloat16 512 {page}"
    for codec, page, capability in product(("none", "int8", "int4"), (0, 64), (80, 90))
)
_APPEND = tuple(
    f"{capability} append {codec} {codec} bfloat16 128 64" for codec, capability in product((*WHOLE, "fp8"), (80, 90))
)
_APPEND += ("80 append int8 int8 bfloat16 128 64 transposed", "90 append int4 int4 bfloat16 128 64 transposed")
# Of int3 and int2, which take the compiler minutes.
OF_BITS = tuple(
    f"{capability} decode {codec} {codec} bfloat16 {dim} {page} groups:{groups} transposed"
    for codec, dim, groups, page, capability in product(BITS, (128, 64), (4, 8), (0, 64), (80, 90))
)
OF_BITS += tuple(
    f"{capability} append {codec} {codec} bfloat16 128 {page}"
    for codec, page, capability in product(BITS, ("64", "0 transposed"), (80, 90))
)
STANDING = (*_DECODE, *_EXPERTS, *_LATENT, *_APPEND, *OF_BITS)
# Those that are over their budgets today, to be taken off as they come within: four to six registers, spilled before
# the loops of tiles and loaded again behind them.
OVER: tuple[str, ...] = (
    "90 decode int3 int3 bfloat16 128 0 groups:4 transposed",
    "90 decode int3 int3 bfloat16 128 0 groups:8 transposed",
    "90 decode int3 int3 bfloat16 128 64 groups:8 transposed",
)
HELD = tuple(spec for spec in STANDING if spec not in OVER)


def least_bytes(spec: str) -> float | None:
    """Gives the bytes that a warp instruction of kernel `spec`'s interior loop has to pay for, None if any do."""
    _, operation, codec, *rest = spec.split()
    if operation == "gemv":
        return EXPERTS.get(codec)
    if operation == "latent":
        return LATENT.get(codec)
    if operation == "decode" and codec in DECODE and rest[2] in ("128", "64"):
        return DECODE[codec][("128", "64").index(rest[2])]
    return None
