"""GPU kernels stay within their budgets of instructions, as compiled on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import sass
from tests.kernels.budgets import HELD, OF_BITS, OVER, STANDING, least_bytes

ROOT = Path(__file__).parent.parent.parent
FEW = (
    "90 decode none none bfloat16 128 64 groups:4",
    "80 decode none none bfloat16 64 0 groups:8",
    "90 decode int8 int8 bfloat16 128 64 groups:4 transposed",
    "80 decode int4 int4 bfloat16 64 0 groups:8 transposed",
    "90 gemv none bfloat16 1 2048 outputs:1536 top:8",
    "80 gemv int8 bfloat16 1 768 outputs:2048 top:8",
    "90 gemv int4 bfloat16 1 2048 outputs:1536 top:8",
)
# Two loops of tiles, of which the second is cheaper, each behind a wait; the third loads much and multiplies nothing.
SAMPLE = """
\t.section\t.text._other_kernel,"ax",@progbits
        /*0000*/                   EXIT ;
//--------------------- .text._some_kernel       --------------------------
\t.section\t.text._some_kernel,"ax",@progbits
.text._some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/             @!PT  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   ISETP.GE.AND P0, PT, R5, R9, PT ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0090*/               @P3 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00a0*/              @UP1 BRA `(.L_x_1) ;
.L_x_2:
        /*00b0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00c0*/                   FFMA R4, R5, R6, R4 ;
        /*00d0*/              @!P0 BRA `(.L_x_2) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
//--------------------- .nv.shared._some_kernel --------------------------
        /*0000*/                   EXIT ;
"""


def test_loops_are_read_from_machine_code() -> None:
    text = sass.kernel_text(SAMPLE, "_some_kernel")
    assert len(sass.instructions(text)[0]) == 16
    masked, plain, other = sass.loops(text)
    assert [len(loop) for loop in (masked, plain, other)] == [7, 3, 3]
    assert [loop.products for loop in (masked, plain, other)] == [16 * 8 * 16, 16 * 8 * 32, 0]
    assert [loop.loaded for loop in (masked, plain, other)] == [512, 64, 512]
    assert masked.opcodes["BRA"] == 2
    assert other.multiplications == 32


def test_the_interior_loop_is_the_cheapest_of_those_that_do_most() -> None:
    masked, plain, other = sass.loops(sass.kernel_text(SAMPLE, "_some_kernel"))
    assert sass.interior([masked, plain, other]) == (plain, 2)
    assert sass.interior([masked, other]) == (masked, 1)
    assert sass.interior([other]) == (other, 1)
    assert sass.interior([]) == (None, 0)
    # A loop around one of tiles is none of tiles, however much stands in it.
    around = sass.Loop(0, plain.last + 1, (*masked.body, *plain.body))
    assert sass.interior([around, plain]) == (plain, 1)


def test_wide_products_of_four_warps() -> None:
    assert sass.Instruction("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24").products == 64 * 256 * 16 // 4


def costs(specs: tuple[str, ...], path: Path) -> list[dict[str, Any]]:
    """What `tests.kernels.audit` counts, in a process that does not interpret kernels."""
    command = [sys.executable, "-m", "tests.kernels.audit", "--json", str(path), *specs]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def check(specs: tuple[str, ...], path: Path) -> None:
    """Asserts that kernels spill no registers, and that their instructions pay for as many bytes as they have to."""
    found = costs(specs, path)
    assert [cost["spec"] for cost in found] == list(specs)
    over = {
        cost["spec"]: (cost["spilled"], cost["bytes_an_instruction"])
        for cost in found
        if cost["spilled"]
        # Where the compiler makes no loop of a few turns, what stands around them counts as well.
        or (cost["num_loops"] and cost["bytes_an_instruction"] < (least_bytes(cost["spec"]) or 0))
    }
    assert not over


def test_a_few_kernels_are_within_their_budgets(tmp_path: Path) -> None:
    assert set(FEW) <= set(HELD)
    check(FEW, tmp_path / "costs.json")


# The slow run counts every third of them, and `.ci/run compile` all.
@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.compile)], ids=["some", "all"]
)
@pytest.mark.parametrize("operation", sorted({spec.split()[1] for spec in STANDING}))
def test_every_standing_kernel_is_within_its_budget(operation: str, step: int, tmp_path: Path) -> None:
    specs = tuple(spec for spec in HELD if spec.split()[1] == operation and spec not in OF_BITS)
    check(specs[::step], tmp_path / "costs.json")


@pytest.mark.compile
def test_kernels_of_bits_are_within_their_budgets(tmp_path: Path) -> None:
    check(tuple(spec for spec in HELD if spec in OF_BITS), tmp_path / "costs.json")


@pytest.mark.slow
def test_a_kernel_of_bits_is_within_its_budget(tmp_path: Path) -> None:
    some = ("80 decode int3 int3 bfloat16 64 64 groups:4 transposed",)
    assert set(some) <= set(HELD)
    check(some, tmp_path / "costs.json")


def test_every_standing_kernel_is_held_or_known_to_be_over() -> None:
    assert sorted((*HELD, *OVER)) == sorted(STANDING)
    assert len(set(STANDING)) == len(STANDING)
