"""`run`: a Linux program for another processor, emulated; and the native kernels of 64-bit ARM, called through it."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import torch

# Addresses that the program itself does not use, and sizes.
STACK, STACK_BYTES = 0x7F0000000000, 1 << 20
BREAK, BREAK_BYTES = 0x10000000, 0x4000000
MAPPED = 0x200000000
PAGE = 4096
READ, READV, WRITE, WRITEV, BRK, MMAP, IOCTL, EXITS = 63, 65, 64, 66, 214, 222, 29, (93, 94)
# Of threads, signals and protection, which a program of one thread asks for and does without.
IGNORED = (96, 98, 123, 134, 135, 178, 215, 226, 233)


def run(program: Path, given: bytes) -> bytes:
    """What a static program for 64-bit ARM writes when it reads `given`.

    Raises:
        RuntimeError: it failed, or asked the system for something unknown.
    """
    import unicorn
    from unicorn import arm64_const as arm

    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors
    arguments = [getattr(arm, f"UC_ARM64_REG_X{index}") for index in range(3)]
    machine.mem_map(BREAK, BREAK_BYTES)
    entry, auxiliary = _load(machine, program.read_bytes())
    machine.mem_map(STACK, STACK_BYTES)
    top = STACK + STACK_BYTES - PAGE
    machine.mem_write(top, struct.pack(f"<{4 + len(auxiliary)}Q", 1, top + 1024, 0, 0, *auxiliary))
    machine.mem_write(top + 1024, b"program\0")
    machine.reg_write(arm.UC_ARM64_REG_SP, top)
    state: dict[str, Any] = {"read": 0, "brk": BREAK, "mapped": MAPPED, "status": None}
    written = bytearray()

    def read(at: int, count: int) -> int:
        part = given[state["read"] : state["read"] + count]
        state["read"] += len(part)
        machine.mem_write(at, part)
        return len(part)

    def pieces(at: int, count: int) -> list[tuple[int, int]]:
        return [struct.unpack("<QQ", machine.mem_read(at + 16 * index, 16)) for index in range(count)]

    def system(machine: Any, *_: object) -> None:
        number = machine.reg_read(arm.UC_ARM64_REG_X8)
        first, second, third = map(machine.reg_read, arguments)
        result = 0
        if number == READ:
            result = read(second, third)
        elif number == READV:
            for at, count in pieces(second, third):
                got = read(at, count)
                result += got
                if got < count:
                    break
        elif number in (WRITE, WRITEV):
            for at, count in [(second, third)] if number == WRITE else pieces(second, third):
                written.extend(machine.mem_read(at, count) if count else b"")
                result += count
        elif number == BRK:
            state["brk"] = result = first if BREAK <= first < BREAK + BREAK_BYTES else state["brk"]
        elif number == MMAP:
            result, count = state["mapped"], -(-second // PAGE) * PAGE
            machine.mem_map(result, count)
            state["mapped"] += count + PAGE  # what is beyond an end may not be touched
        elif number == IOCTL:
            result = 2**64 - 25  # no terminal
        elif number in EXITS:
            state["status"] = first
            machine.emu_stop()
            return
        elif number not in IGNORED:
            state["status"] = f"asked for system call {number}"
            machine.emu_stop()
            return
        machine.reg_write(arguments[0], result)

    machine.hook_add(unicorn.UC_HOOK_INTR, system)
    try:
        machine.emu_start(entry, 0, timeout=300 * 1_000_000)
    except unicorn.UcError as error:
        raise RuntimeError(f"{error} at {machine.reg_read(arm.UC_ARM64_REG_PC):#x}") from error
    if state["status"] != 0:
        raise RuntimeError(f"the program ended with {state['status']}")
    return bytes(written)


def _load(machine: Any, elf: bytes) -> tuple[int, list[int]]:
    """Puts a program where it wants to be; its entry, and what Linux tells it of itself."""
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    mapped, headers_at = set(), 0
    for index in range(count):
        kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from(
            "<IIQQQQQQ", elf, headers + index * size
        )
        if kind == 6:
            headers_at = address
        if kind != 1:
            continue
        for page in range(address // PAGE, -(-(address + in_memory) // PAGE)):
            if page not in mapped:
                machine.mem_map(page * PAGE, PAGE)
                mapped.add(page)
        machine.mem_write(address, elf[offset : offset + in_file])
    return entry, [3, headers_at, 4, size, 5, count, 6, PAGE, 25, STACK, 0, 0]


class EmulatedLibrary:
    """Stands for the loaded library: each call runs a program that reads the memory and gives it back.

    Args:
        program: `arm_program.cpp` with the kernels, compiled.
    """

    def __init__(self, program: Path) -> None:
        self.program = program
        self.sizes: dict[int, int] = {}

    def knows(self, *tensors: torch.Tensor | None) -> None:
        """Notes how many bytes lie where tensors are."""
        self.sizes |= {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t is not None}

    def hfkv_attend(self, shape: int, *given: Any) -> int:
        numbers = (ctypes.c_int64 * 21).from_address(shape)
        batch, _, heads, groups, queries, _, width, _, dtype = numbers[:9]
        rows = batch * heads * groups * queries
        *memory, scale, softcap, out, lse = given
        places, tables = memory[9:11]
        if places:
            pairs, _, slow, turns = (ctypes.c_int64 * 4).from_address(places)
            numbers_of_tables = (pairs - slow + 8) * 64 + slow * 16 + (64 + turns) * 2 * pairs
            self.sizes |= {places: 8 * (5 + 2 * pairs + batch), tables: 4 * numbers_of_tables}
        self.sizes |= {out: rows * width * (4 if dtype == 0 else 2), lse: rows * 4}
        factors = struct.pack("<qff", 8, scale, softcap)
        return self._call(
            b"q", shape, 21, [*map(self._bytes, memory), factors, self._bytes(out), self._bytes(lse)], (out, lse)
        )

    def hfkv_append(self, shape: int, *memory: Any) -> int:
        return self._call(b"a", shape, 22, [*map(self._bytes, memory)], memory[3:])

    def _bytes(self, at: int) -> bytes:
        size = self.sizes[at] if at else 0
        return struct.pack("<q", size) + (ctypes.string_at(at, size) if size else b"")

    def _call(self, which: bytes, shape: int, numbers: int, memory: list[bytes], results: tuple[int, ...]) -> int:
        head = struct.pack("<q", 1) + which + struct.pack("<q", 8 * numbers) + ctypes.string_at(shape, 8 * numbers)
        said = run(self.program, head + b"".join(memory))
        place = 4
        for at in results:
            size = self.sizes[at] if at else 0
            ctypes.memmove(at, said[place : place + size], size)
            place += size
        return int.from_bytes(said[:4], "little", signed=True)
