"""What kernels cost a GPU in issue slots, counted in what the compiler makes of them, without a GPU.

``python -m tests.kernels.audit [SPEC ...]`` prints for each kernel, as `tests.kernels.compiling` describes them, or for
the standing ones of `tests.kernels.budgets`: registers, bytes of them spilled, shared memory, the instructions of its
interior loop, how many bytes of what is held (keys and values, latents, or weights) one warp instruction pays for, and
the bandwidth at which issuing instructions alone is the limit. ``--opcodes`` also counts these.

A bound, not a measurement: memory, latencies and barriers come on top. Which loop counts says `sass.interior`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from tests.kernels import compiling, sass
from tests.kernels.budgets import OVER, STANDING, least_bytes

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of an H200: 132 multiprocessors at about 1.755 GHz under load, two of whose four schedulers issue in a cycle. That is
# what good kernels sustain that memory limits.
SLOTS_PER_SECOND = 132 * 2 * 1.755e9
# What runs beside the kernels that read what is held.
SMALL = ("_merge_kernel", "_combine_kernel", "_tile_kernel")


@dataclass(frozen=True)
class Cost:
    """What one kernel costs.

    Attributes:
        spec: the kernel, as it was asked for.
        registers: registers a thread.
        spilled: bytes of memory a thread for what found no register.
        shared: bytes of shared memory a program.
        num_warps: warps a program.
        num_loops: loops of tiles.
        instructions: of one turn of the interior loop and one warp; of the whole kernel where there is no loop.
        turn_bytes: bytes of what is held that a program reads in them; 0 in a kernel that reads none.
        opcodes: how often each stands in the loop, the most frequent first.
    """

    spec: str
    registers: int
    spilled: int
    shared: int
    num_warps: int
    num_loops: int
    instructions: int
    turn_bytes: int
    opcodes: dict[str, int]

    @property
    def bytes_an_instruction(self) -> float:
        """Bytes of what is held that one warp instruction of the interior loop pays for."""
        return self.turn_bytes / (self.instructions * self.num_warps)

    @property
    def verdict(self) -> str:
        """How it stands to its budget, in words."""
        least = least_bytes(self.spec)
        if self.spilled:
            return "over budget: registers spilled"
        if least is None:
            return ""
        if self.num_loops == 0:
            return "no loop: this is all of it"
        if self.bytes_an_instruction < least:
            return f"over budget: {least:g} bytes wanted"
        return f"within {least:g}" + (", though listed as over" if self.spec in OVER else "")


def _row_bytes(codec: str, dim: int, dtype: str) -> int:
    """Bytes of a token's numbers in one set of planes."""
    size = 4 if dtype == "float32" else 2
    few = {"int3": (dim + 7) // 8 * 3 + 1, "int2": (dim + 3) // 4 + 2}
    return {"none": dim * size, "int8": dim + 2, "fp8": dim + 2, "int4": (dim + 1) // 2 + 4, **few}[codec]


def _loaded_twice(spec: str, binary: compiling.Binary) -> int:
    """Bytes of a tile that are loaded once more: those of int2, of which each is read with the one before."""
    _, operation, *codecs = spec.split()[:4]
    if operation == "gemv":
        return 0
    return binary.constants["BLOCK_N"] * codecs.count("int2") * ((int(spec.split()[5]) + 3) // 4)


def _turn(spec: str, binary: compiling.Binary) -> tuple[int, int] | None:
    """Gives the bytes of what is held in one tile, and the multiplications that it is worth; None without tiles."""
    _, operation, *rest = spec.split()
    constants = binary.constants
    if operation == "gemv":
        form, dtype, *_ = rest
        rows, width = constants["A_BLOCK_N"], constants["A_BLOCK_K"]
        if form == "int4":
            # A row's bytes, or its words of four, and the two codes of each 16 bytes.
            width *= 1 if constants["A_CODEC"] == "int4" else 4
            return rows * (width + 2 * (width // 16)), rows * width * 2
        return rows * width * (1 if form == "int8" else 4 if dtype == "float32" else 2), rows * width
    if operation == "append" or operation == "gemm" or operation.endswith("-append"):
        return None
    key_codec, value_codec, dtype, dim, *_ = rest
    tokens, head_dim = constants["BLOCK_N"], int(dim)
    rows = constants.get("BLOCK_M", compiling.MIN_ROWS)
    if operation == "latent":
        dims = head_dim, compiling.ROTARY_DIM
        size = sum(_row_bytes(key_codec, each, dtype) for each in dims)
        # Latents are keys and values.
        return tokens * size, rows * tokens * (2 * head_dim + compiling.ROTARY_DIM)
    size = _row_bytes(key_codec, head_dim, dtype) + _row_bytes(value_codec, head_dim, dtype)
    return tokens * size, rows * tokens * 2 * head_dim


def cost_of(spec: str, binary: compiling.Binary) -> Cost:
    """Counts what a compiled kernel costs.

    The compiler may make one turn of several. So many as fit into both what the loop loads and what it multiplies are
    taken for it: either may be more than a tile's, never less.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.compiled.asm["cubin"])
        file.flush()
        usage = _said("cuobjdump", "-res-usage", file.name)
        text = sass.kernel_text(_said("nvdisasm", "-c", file.name), binary.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None, usage
    num_warps, tile = binary.options.get("num_warps", 4), _turn(spec, binary)
    whole = sass.instructions(text)[0]
    loop, num_loops = sass.interior(sass.loops(text)) if tile else (None, 0)
    instructions, turn_bytes, opcodes = len(whole), 0, {}
    if tile:
        size, multiplications = tile
        # Of a few turns the compiler makes none.
        loop = loop or sass.Loop(0, len(whole) - 1, tuple(whole))
        turns = min(
            loop.loaded * num_warps // (size + _loaded_twice(spec, binary)),
            loop.multiplications * num_warps // multiplications,
        )
        assert turns > 0, f"{spec}: no loop reads a tile of {size} bytes"
        instructions, turn_bytes, opcodes = len(loop), turns * size, dict(loop.opcodes.most_common())
    resources = int(used[1]), int(used[2]), binary.compiled.metadata.shared
    return Cost(spec, *resources, num_warps, num_loops, instructions, turn_bytes, opcodes)


def _said(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def audit(spec: str) -> Cost:
    """Compiles the kernel `spec`, and counts what it costs."""
    first = len(compiling.BINARIES)
    compiling.compile_kernel(spec)
    (binary,) = (each for each in compiling.BINARIES[first:] if each.name not in SMALL)
    return cost_of(spec, binary)


def row(cost: Cost) -> str:
    """Puts what a kernel costs in a line of the table."""
    counts = f"{cost.registers:>5}{cost.spilled:>6}{cost.shared:>8}{cost.num_warps:>4}{cost.num_loops:>4}"
    paid = " " * 15
    if cost.turn_bytes:
        each = cost.bytes_an_instruction
        paid = f"{each:>7.2f}{each * SLOTS_PER_SECOND / 1e12:>8.2f}"
    return f"{cost.spec:<62}{counts}{cost.instructions:>7}{paid}  {cost.verdict}".rstrip()


HEAD = f"{'kernel':<62}{'regs':>5}{'spill':>6}{'shared':>8}{'w':>4}{'L':>4}{'instr':>7}{'B/instr':>7}{'TB/s':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", nargs="*", metavar="SPEC", help="a kernel; see tests/kernels/compiling.py")
    parser.add_argument("--opcodes", action="store_true", help="count the opcodes of the interior loop")
    parser.add_argument("--json", type=Path, help="write the costs to a file as well")
    chosen = parser.parse_args()
    # Compiling prints as well.
    table, sys.stdout = sys.stdout, sys.stderr
    print(HEAD, file=table)
    costs = []
    for spec in chosen.specs or STANDING:
        costs.append(audit(spec))
        print(row(costs[-1]), file=table, flush=True)
        if chosen.opcodes:
            print("   ", costs[-1].opcodes, file=table)
    if chosen.json:
        found = [
            {**asdict(cost), "bytes_an_instruction": cost.turn_bytes and cost.bytes_an_instruction} for cost in costs
        ]
        chosen.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
