"""Tile sizes, warps and pipeline stages of the experts' kernels, and which of them serves how many slots.

None of the numbers here has been measured on a GPU yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from hfkv.kernels.experts.codes import GROUP
from hfkv.kernels.triton.tiling import MIN_BLOCK, Device, padded

# Bytes of weights that a program of the GEMV has in flight: four loads of 16 bytes by each of 128 threads.
GEMV_TILE_BYTES = 8192
GEMV_WARP_BYTES = 4 * 16 * 32
# What of a row it reads at a time, widest first: the first that the row does not waste an eighth of.
GEMV_ROW_BYTES = (512, 256, 128, 64)
# Programs that a multiprocessor is to hold at a time, for loads enough to be under way.
GEMV_PROGRAMS = 4
# A part of the inputs of fewer tiles costs more to add up than it saves.
MIN_TILES, MAX_SPLITS = 2, 8
MIN_BLOCK_M, MAX_BLOCK_M = MIN_BLOCK, 128
# Bytes of weights that a program of the GEMM has under way where an expert has few rows.
FEW_ROWS_BYTES = 32 << 10


@dataclass(frozen=True)
class GemvTiling:
    """Rows of weights and numbers of each (bytes or words, in int4) that a program reads at a time, and its warps."""

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class GemmTiling:
    """Outputs and inputs of a tile, and how the compiler is to schedule it."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def is_few(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Says whether to read an expert's weights for each slot on its own.

    One token has no two slots of one expert; of E / 4 slots about one in eight meets another, which is likely to find
    the weights in the GPU's cache, and sorting takes a launch.
    """
    return num_tokens * top_k <= max(top_k, num_experts // 4)


def choose_block_m(num_slots: int, num_experts: int) -> int:
    """Chooses the rows of a tile of the GEMM: a power of two with room for half more than an expert has on average."""
    return min(MAX_BLOCK_M, padded(3 * num_slots // (2 * num_experts)))


@functools.lru_cache(maxsize=1024)
def gemv_tiling(
    device: Device, num_slots: int, num_rows: int, width: int, item_size: int, *, is_transposed: bool
) -> GemvTiling:
    """Chooses the tiling of one part.

    Args:
        device: where it runs.
        num_slots: S.
        num_rows: N of the part.
        width: numbers of a row, bytes or words in int4.
        item_size: bytes of one of them.
        is_transposed: whether numbers of a column lie side by side, not those of a row.
    """
    if is_transposed:
        block_n, fewest = 256 // item_size, 32
    else:
        sizes = [size // item_size for size in GEMV_ROW_BYTES]
        block_k = next((size for size in sizes if 8 * (-width % size) <= width), sizes[-1])
        block_n, fewest = GEMV_TILE_BYTES // item_size // block_k, 4
    block_n = min(block_n, max(fewest, triton.next_power_of_2(num_rows)))
    wanted = GEMV_PROGRAMS * device.num_multiprocessors
    while block_n > fewest and num_slots * triton.cdiv(num_rows, block_n) < wanted:
        block_n //= 2
    if is_transposed:
        block_k = min(GEMV_TILE_BYTES // item_size // block_n, max(16, triton.next_power_of_2(width)))
    # Four loads by each thread: what a row of x costs a thread is shared by as many rows of weights.
    num_warps = max(1, min(4, block_n * block_k * item_size // GEMV_WARP_BYTES))
    return GemvTiling(block_n, block_k, num_warps)


def gemv_splits(device: Device, num_programs: int, num_tiles: int) -> int:
    """Chooses into how many parts to cut the inputs, so that no multiprocessor is left without work.

    Args:
        device: where it runs.
        num_programs: programs of one part.
        num_tiles: tiles that each reads.
    """
    wanted = triton.cdiv(GEMV_PROGRAMS * device.num_multiprocessors, 2 * max(1, num_programs))
    return max(1, min(wanted, MAX_SPLITS, num_tiles // MIN_TILES))


@functools.lru_cache(maxsize=1024)
def gemm_tiling(device: Device, block_m: int, codec: str, dtype: torch.dtype) -> GemmTiling:
    """Chooses the tiling of one part.

    Args:
        device: where it runs.
        block_m: rows of x a tile.
        codec: codec of the weights.
        dtype: dtype of the factors of products.
    """
    if device.holds_factors(dtype):
        return GemmTiling(32, GROUP, 4, 1)
    # Few rows: weights are read once, and much of them has to be under way. Many: as many outputs, and two programs a
    # multiprocessor; fewer inputs would make the codes of int4's groups loads too small to run ahead.
    block_n, block_k = (64, 128) if block_m < 64 else (128, 128 if codec == "int4" else 64)
    # From Hopper on, products of 64 rows and more run on while the next tile is waited for, and hold their own.
    is_async = block_m >= 64 and device.shared_memory > 200 << 10
    if block_m >= 64 and codec == "int4" and not is_async:
        # Decoded in registers, which larger tiles do not find room in.
        block_n, block_k = 64, 64
    item_size = dtype.itemsize
    room = device.shared_memory
    if codec != "none":
        # Decoded in one more place.
        room -= block_n * block_k * item_size
    weight_bytes = {"none": item_size * block_k, "int8": block_k, "int4": block_k // 2}[codec] * block_n
    buffers = room // (weight_bytes + block_m * block_k * item_size)
    most = 3 if block_m >= 64 else min(5, max(3, FEW_ROWS_BYTES // weight_bytes))
    num_stages = max(1, min(most, buffers if is_async else buffers + 1))
    # Half as many warps have no room for the places of 64 rows that end within a tile.
    return GemmTiling(block_n, block_k, 8 if block_m >= 64 else 4, num_stages)
