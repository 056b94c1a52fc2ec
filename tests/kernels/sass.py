"""Machine code of NVIDIA GPUs as nvdisasm prints it: instructions, loops, and the loop that reads what is held."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P(?:\d+|T))\s+)?(.*?)\s*;")
_JUMP = re.compile(r"^BRA\b.*?(\.L_x_\d+)")
# Factors of one instruction of a warp's tensor cores: m16n8k16 is written 16816, 64x32x16 with its crosses.
_MMA = re.compile(r"^[HIQ]MMA\.(?:SP\.)?(16)(8)(\d+)\b")
_WARPGROUP_MMA = re.compile(r"^[HIQ]GMMA\.(\d+)x(\d+)x(\d+)\b")
_GLOBAL_LOAD = re.compile(r"^(?:LDG|LDGSTS)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction, without its predicate.

    Attributes:
        text: opcode and operands.
        predicate: as it is written behind the `@`; empty without one.
    """

    text: str
    predicate: str = ""

    @property
    def opcode(self) -> str:
        """Opcode without its suffixes."""
        return self.text.split()[0].split(".")[0]

    @property
    def loaded(self) -> int:
        """Bytes that 32 threads load of global memory."""
        if self.predicate == "!PT" or not _GLOBAL_LOAD.match(self.text):
            return 0
        suffixes = self.text.split()[0].split(".")
        widths = {"64": 8, "128": 16, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return 32 * next((size for suffix, size in widths.items() if suffix in suffixes), 4)

    @property
    def products(self) -> int:
        """Multiplications of numbers, on tensor cores, that one warp does."""
        mma = _MMA.match(self.text)
        if mma:
            return int(mma[1]) * int(mma[2]) * int(mma[3])
        mma = _WARPGROUP_MMA.match(self.text)
        # Four warps issue it together.
        return int(mma[1]) * int(mma[2]) * int(mma[3]) // 4 if mma else 0

    @property
    def multiplications(self) -> int:
        """Multiplications outside of tensor cores that one warp does of 32-bit floats, or of bytes four at a time."""
        return {"FMUL": 32, "FFMA": 32, "FMUL2": 64, "FFMA2": 64, "IDP": 128}.get(self.opcode, 0)


@dataclass(frozen=True)
class Loop:
    """Instructions from where a branch jumps back to, up to that branch.

    Attributes:
        first, last: places of the first and the last of them in the kernel.
        body: the instructions.
    """

    first: int
    last: int
    body: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.body)

    @property
    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in it."""
        return Counter(instruction.opcode for instruction in self.body)

    @property
    def loaded(self) -> int:
        """Bytes that a warp loads of global memory in one turn."""
        return sum(instruction.loaded for instruction in self.body)

    @property
    def products(self) -> int:
        """Multiplications on tensor cores that a warp does in one turn."""
        return sum(instruction.products for instruction in self.body)

    @property
    def multiplications(self) -> int:
        """Multiplications on tensor cores, or where there are none outside of them, of one turn."""
        return self.products or sum(instruction.multiplications for instruction in self.body)


def kernel_text(text: str, name: str) -> str:
    """Cuts the section of kernel `name` out of what nvdisasm prints."""
    _, _, behind = text.partition(f".section\t.text.{name},")
    return behind.partition("\n//---")[0]


def instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Reads the instructions of a kernel in their order, and the place of the one behind each label."""
    found, labels = [], {}
    for line in text.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            labels[label[1]] = len(found)
        match = _INSTRUCTION.match(line)
        if match:
            found.append(Instruction(match[2], match[1] or ""))
    return found, labels


def loops(text: str) -> list[Loop]:
    """Finds the loops of a kernel in the order of their beginnings; those with the same beginning are one."""
    found, labels = instructions(text)
    ends: dict[int, int] = {}
    for index, instruction in enumerate(found):
        jump = _JUMP.match(instruction.text)
        target = labels.get(jump[1], index + 1) if jump else index + 1
        # A branch to itself is what follows the end of every kernel.
        if target < index:
            ends[target] = max(index, ends.get(target, 0))
    return [Loop(first, last, tuple(found[first : last + 1])) for first, last in sorted(ends.items())]


def interior(found: list[Loop]) -> tuple[Loop | None, int]:
    """Chooses the loop that most of what is held goes through, and says of how many.

    A kernel may have a loop for tiles that all queries see, and another for those at an edge, which does the same work
    and looks at every token besides. Work is products on tensor cores, or bytes loaded where a kernel has none. Loops
    that do at least half as much of it in a turn as the one that does most, and have no such loop inside, are those of
    tiles; of them the interior one is that with the fewest instructions for its work.
    """

    def work(loop: Loop) -> int:
        return loop.products if any(one.products for one in found) else loop.loaded

    most = max(map(work, found), default=0)
    tiles = [loop for loop in found if most and 2 * work(loop) >= most]
    tiles = [
        loop
        for loop in tiles
        if not any(loop is not other and loop.first <= other.first and other.last <= loop.last for other in tiles)
    ]
    return min(tiles, key=lambda loop: len(loop) / work(loop), default=None), len(tiles)
