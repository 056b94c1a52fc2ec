"""Tile sizes, warps and pipeline stages of the attention kernels, and into how many splits keys are cut.

None of the numbers here has been measured on a GPU yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from hfkv.kernels.triton.merge import MAX_SPLITS

# A split of fewer tiles costs more to start and to merge than it saves.
MIN_TILES = 4
# Programs of the decode kernel that a multiprocessor is to hold at a time, at least: one loads while another computes.
PROGRAMS_PER_MULTIPROCESSOR = 2
# And warps, of which its registers hold no more where each takes all that it can.
WARPS_PER_MULTIPROCESSOR = 8
# Of the best share of busy multiprocessors, what the fewest splits have to reach (FlashAttention's heuristic).
ENOUGH = 0.85
# Shared memory for tiles, in bytes: of 227, 163 and 99 KiB, with room for reductions.
SHARED_MEMORY = {(9, 0): 212 << 10, (10, 0): 212 << 10, (10, 3): 212 << 10, (8, 0): 148 << 10}
LITTLE_SHARED_MEMORY = 84 << 10
# Of a thread; ptxas, not told, may stay below 168 and put some on the stack, so that three programs fit.
MAX_REGISTERS = 255
# Rows and columns of a product, at least.
MIN_BLOCK = 16


@dataclass(frozen=True)
class Device:
    """Sizes of a device that tiles depend on."""

    num_multiprocessors: int
    shared_memory: int

    def holds_factors(self, dtype: torch.dtype) -> bool:
        """Says whether products of `dtype` hold their factors in registers.

        Exact ones do, as they do not run on tensor cores; interpreted ones hold nothing.
        """
        return dtype == torch.float32 and self.num_multiprocessors > 1


@dataclass(frozen=True)
class Tiling:
    """Rows and tokens of a tile, and how the compiler is to schedule them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """Gives the sizes of a device; a CPU, where kernels are interpreted, has those of the smallest."""
    if device.type != "cuda":
        return Device(1, LITTLE_SHARED_MEMORY)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = SHARED_MEMORY.get((properties.major, properties.minor), LITTLE_SHARED_MEMORY)
    return Device(properties.multi_processor_count, shared_memory)


@functools.lru_cache(maxsize=1024)
def padded(number: int, least: int = MIN_BLOCK) -> int:
    """Rounds a number of rows or columns up to what a product takes: a power of two, `least` or more."""
    return max(least, triton.next_power_of_2(number))


def columns_of(codec: str, dim: int, width: int, least: int = MIN_BLOCK) -> int:
    """Gives the columns of a tile, `least` or more, for rows of `dim` numbers whose data are `width` wide.

    Those of int3 and int2 are the numbers that are read from bytes, those of other codecs the data.
    """
    return padded(dim if codec in ("int3", "int2") else width, least)


def loaded_bytes(codec: str, columns: int, item_size: int) -> int:
    """Gives the bytes of a token that tiles of so many columns are loaded from, padding among them."""
    return {"int3": columns // 8 * 3, "int2": columns // 4 * 2}.get(codec, columns * item_size)


def programs_together(num_warps: int) -> int:
    """Gives how many programs of the decode kernel a multiprocessor is to hold at a time."""
    return max(PROGRAMS_PER_MULTIPROCESSOR, WARPS_PER_MULTIPROCESSOR // num_warps)


def warps_for(num_rows: int, num_columns: int) -> int:
    """Gives the warps that hold `[num_rows, num_columns]` sums in their registers."""
    return 8 if num_rows * num_columns >= 128 * 128 else 4


@functools.lru_cache(maxsize=1024)
def tiling(
    device: Device,
    num_rows: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    item_size: int,
    token_bytes: int,
    page_size: int,
    *,
    is_prefill: bool,
    wave_bytes: int = 0,
) -> Tiling:
    """Chooses the tiling for the rows of one kv head.

    Args:
        device: where it runs.
        num_rows: queries times heads of a group.
        widths: the padded head dims of keys and values.
        dtype: dtype of the queries.
        item_size: bytes of a number in a product.
        token_bytes: bytes of a token's key and value as they are stored, padded.
        page_size: P, or 0 for contiguous planes.
        is_prefill: whether there are many queries.
        wave_bytes: bytes of the cosines and sines of a position, where keys have a mean.
    """
    width = max(widths)
    max_buffers = 2 if is_prefill else 3
    if device.holds_factors(dtype):
        block_m, block_n, max_buffers = 16, 16, 1
    elif is_prefill and item_size == 2 and width <= 128:
        block_m, block_n = 128, 64
    else:
        block_m, block_n = 64, 64 if width <= 128 and item_size == 2 else 32
    block_m = min(block_m, padded(num_rows))
    num_warps = warps_for(block_m, width)
    block_n = _in_page(block_n, page_size, 32)
    room = device.shared_memory - block_m * (widths[0] * item_size + wave_bytes)
    num_stages = _num_stages(room, max_buffers, block_n, sum(widths) * item_size, token_bytes + wave_bytes, page_size)
    return Tiling(block_m, block_n, num_warps, num_stages)


@functools.lru_cache(maxsize=1024)
def digits_tiling(
    device: Device,
    num_rows: int,
    widths: tuple[int, int],
    codecs: tuple[str, str],
    page_size: int,
    wave_bytes: int = 0,
) -> Tiling:
    """Chooses the tiling for the rows of one kv head where products are of integers.

    Args:
        device: where it runs.
        num_rows: queries times heads of a group.
        widths: the columns of a tile of keys and of one of values, as `columns_of` gives them.
        codecs: codecs of keys and of values.
        page_size: P, or 0 for contiguous planes.
        wave_bytes: bytes of the cosines and sines of a position, where keys have a mean.
    """
    # Rows are pairs of digits: 8 fill a tile of a product. The sums of 32 do not stay in registers, nor those of 16 in
    # wide heads or beside 8-bit floats that become float16.
    is_wide = max(width << (codec == "int4") for width, codec in zip(widths, codecs, strict=True)) > 128
    # Parts of values are products of their own, which more than one warp would all compute where they are narrow.
    in_parts = codecs[1] == "int3"
    is_alone = in_parts and widths[1] <= 128
    block_m = 8 if num_rows <= 8 or is_wide or "fp8" in codecs or in_parts else 16
    num_warps = 1 if is_alone else 8 if (is_wide and not in_parts) or block_m == 16 else 4
    token_bytes = sum(loaded_bytes(codec, width, 1) for codec, width in zip(codecs, widths, strict=True))
    # Those of a tile stay, the same ones for all.
    converted_bytes = wave_bytes
    converted_bytes += widths[0] * (codecs[0] in ("int3", "int2"))
    converted_bytes += widths[1] * {"fp8": 2, "int2": 1}.get(codecs[1], 0)
    block_n = 64 if is_alone or codecs[1] == "int2" else 128
    while block_n > 32 and block_n * (2 * token_bytes + converted_bytes) > device.shared_memory:
        block_n //= 2
    # As many programs a multiprocessor as there are to be, and two tiles on their way.
    room = device.shared_memory // programs_together(num_warps) - block_n * converted_bytes
    room = max(room, 2 * block_n * token_bytes)
    num_stages = _num_stages(room, 3, block_n, token_bytes, token_bytes, page_size)
    return Tiling(block_m, block_n, num_warps, num_stages)


@functools.lru_cache(maxsize=1024)
def latent_tiling(
    device: Device,
    num_rows: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    item_size: int,
    token_bytes: int,
    page_size: int,
    is_unpacked: bool = False,
) -> Tiling:
    """Chooses the tiling for the rows of latents, of which a tile is a factor of both products.

    Of 512 dimensions, 32 rows and 8 warps (int4: 16) are the most whose sums stay in registers (as compiled for 8.0,
    8.9 and 9.0). 64 rows, which Hopper's own instructions need, would read tokens half as often from L2; but they
    spill, and take half as many instructions more for each row and token. Where nothing has to be decoded and shared
    memory has room, 64 tokens share what a tile costs besides.

    Args:
        device: where it runs.
        num_rows: queries times heads.
        widths: the padded dimensions of latents and rotary keys.
        dtype: dtype of the queries.
        item_size: bytes of a number in a product.
        token_bytes: bytes of a token's latent and rotary key as they are stored, padded.
        page_size: P, or 0 for contiguous planes.
        is_unpacked: whether latents are of int3 or int2.
    """
    is_decoded = token_bytes != sum(widths) * item_size
    block_m, block_n, max_buffers = 32, 32, 2
    if item_size == 4:
        block_n = 16
        if device.holds_factors(dtype):
            block_m, max_buffers = 16, 1
    elif token_bytes < sum(widths):
        # Both halves of int4 have sums of their own; int3 and int2 become numbers of fewer tokens at a time.
        block_m, block_n = 16, 32 if is_unpacked else 64
    elif not is_decoded and device.shared_memory >= SHARED_MEMORY[9, 0]:
        block_n = 64
    block_m = min(block_m, padded(num_rows))
    num_warps = 4 if block_m == 16 and not is_decoded else 8
    block_n = _in_page(block_n, page_size, 16)
    room = device.shared_memory - block_m * sum(widths) * item_size
    num_stages = _num_stages(room, max_buffers, block_n, sum(widths) * item_size, token_bytes, page_size)
    return Tiling(block_m, block_n, num_warps, num_stages)


def _in_page(block_n: int, page_size: int, fewest: int) -> int:
    """Cuts a tile to one page of `fewest` tokens or more, or to a part of one: its id is then one number."""
    is_divisible = page_size >= fewest and page_size & (page_size - 1) == 0
    return min(block_n, page_size) if is_divisible else block_n


def _num_stages(room: int, max_buffers: int, block_n: int, factor_bytes: int, token_bytes: int, page_size: int) -> int:
    """Gives the pipeline stages for as many tiles on their way as shared memory has room for.

    Args:
        room: bytes of shared memory beside the queries, which stay.
        max_buffers: tiles on their way, at most.
        block_n: tokens of a tile.
        factor_bytes: bytes of a token as the products' factors.
        token_bytes: bytes of a token as it is stored.
        page_size: P, or 0 for contiguous planes.
    """
    # A tile is loaded into one buffer while others wait or are computed with, decoded in one more place.
    if token_bytes != factor_bytes:
        room -= block_n * factor_bytes
    buffers = max(1, min(max_buffers, room // (block_n * token_bytes)))
    # A page's id is loaded as far ahead of its tokens as they are ahead of their use.
    return 2 * buffers + 1 if page_size else buffers + 1


@functools.lru_cache(maxsize=1024)
def choose_splits(device: Device, num_programs: int, num_tiles: int, num_warps: int = 4) -> int:
    """Chooses the fewest splits that keep the multiprocessors about as busy as the best number of splits.

    Args:
        device: where it runs.
        num_programs: programs of one split.
        num_tiles: tiles of keys there is capacity for.
        num_warps: warps of a program.
    """
    places = device.num_multiprocessors * programs_together(num_warps)
    most = max(1, min(MAX_SPLITS, num_tiles // MIN_TILES))

    def busy(num_splits: int) -> float:
        waves = num_programs * num_splits / places
        return waves / -(-num_programs * num_splits // places)

    best = max(busy(num_splits) for num_splits in range(1, most + 1))
    return next(num_splits for num_splits in range(1, most + 1) if busy(num_splits) >= ENOUGH * best)
