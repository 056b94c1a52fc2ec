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
# Programs of the decode kernel that a multiprocessor is to hold at a time: one loads while another computes.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Of the best share of busy multiprocessors, what the fewest splits have to reach (FlashAttention's heuristic).
ENOUGH = 0.85
# Shared memory for tiles, in bytes: of 227, 163 and 99 KiB, with room for reductions.
SHARED_MEMORY = {(9, 0): 212 << 10, (10, 0): 212 << 10, (10, 3): 212 << 10, (8, 0): 148 << 10}
LITTLE_SHARED_MEMORY = 84 << 10


@dataclass(frozen=True)
class Device:
    """What tile sizes depend on."""

    num_multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class Tiling:
    """Rows and tokens of a tile, and how the compiler is to schedule them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """The device's sizes; for a CPU, where kernels are interpreted, those of the smallest."""
    if device.type != "cuda":
        return Device(1, LITTLE_SHARED_MEMORY)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = SHARED_MEMORY.get((properties.major, properties.minor), LITTLE_SHARED_MEMORY)
    return Device(properties.multi_processor_count, shared_memory)


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
) -> Tiling:
    """The tiling for one kv head's rows.

    Args:
        device: where it runs.
        num_rows: queries times heads of a group.
        widths: the padded head dims of keys and values.
        dtype: of the queries.
        item_size: bytes of a number in a product.
        token_bytes: bytes of a token's key and value as they are stored, padded.
        page_size: P, or 0 for contiguous planes.
        is_prefill: whether there are many queries.
    """
    width = max(widths)
    max_buffers = 2 if is_prefill else 3
    if dtype == torch.float32 and device.num_multiprocessors > 1:
        # Exact products do not run on tensor cores and hold their factors in registers; interpreted ones hold nothing.
        block_m, block_n, max_buffers = 16, 16, 1
    elif is_prefill and item_size == 2 and width <= 128:
        block_m, block_n = 128, 64
    else:
        block_m, block_n = 64, 64 if width <= 128 and item_size == 2 else 32
    block_m = min(block_m, max(16, triton.next_power_of_2(num_rows)))
    num_warps = 8 if block_m * width >= 128 * 128 else 4
    if page_size >= 32 and page_size & (page_size - 1) == 0:
        # One page a tile, or a part of one: its id is then one number.
        block_n = min(block_n, page_size)
    # A tile is loaded into one buffer while others wait or are computed with, decoded in one more place; queries stay.
    room = device.shared_memory - block_m * widths[0] * item_size
    if token_bytes != sum(widths) * item_size:
        room -= block_n * sum(widths) * item_size
    buffers = max(1, min(max_buffers, room // (block_n * token_bytes)))
    # A page's id is loaded as far ahead of its tokens as they are ahead of their use.
    return Tiling(block_m, block_n, num_warps, 2 * buffers + 1 if page_size else buffers + 1)


def latent_tiling(
    device: Device,
    num_rows: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    item_size: int,
    token_bytes: int,
    page_size: int,
) -> Tiling:
    """The tiling for the rows of latents: a tile of theirs is a factor of both products.

    Of 512 dimensions, 32 rows and 8 warps are the most whose sums stay in registers whatever the codec (as compiled for
    8.0, 8.9 and 9.0). 64 rows, which Hopper's own instructions need, read tokens half as often and spill: little where
    nothing has to be decoded, so there they are taken, which is a guess as all of this is.

    Args:
        device: where it runs.
        num_rows: queries times heads.
        widths: the padded dimensions of latents and rotary keys.
        dtype: of the queries.
        item_size: bytes of a number in a product.
        token_bytes: bytes of a token's latent and rotary key as they are stored, padded.
        page_size: P, or 0 for contiguous planes.
    """
    is_decoded = token_bytes != sum(widths) * item_size
    block_m, block_n, max_buffers = 32, 32, 2
    if item_size == 4:
        block_n = 16
        if dtype == torch.float32 and device.num_multiprocessors > 1:
            # As in `tiling`.
            block_m, max_buffers = 16, 1
    elif not is_decoded and device.shared_memory >= SHARED_MEMORY[9, 0]:
        block_m = 64
    block_m = min(block_m, max(16, triton.next_power_of_2(num_rows)))
    num_warps = 4 if block_m == 16 and not is_decoded else 8
    if page_size >= 16 and page_size & (page_size - 1) == 0:
        block_n = min(block_n, page_size)
    room = device.shared_memory - block_m * sum(widths) * item_size
    if is_decoded:
        room -= block_n * sum(widths) * item_size
    buffers = max(1, min(max_buffers, room // (block_n * token_bytes)))
    return Tiling(block_m, block_n, num_warps, 2 * buffers + 1 if page_size else buffers + 1)


@functools.lru_cache(maxsize=1024)
def choose_splits(device: Device, num_programs: int, num_tiles: int) -> int:
    """The fewest splits that keep the multiprocessors about as busy as the best number of splits.

    Args:
        device: where it runs.
        num_programs: programs of one split.
        num_tiles: tiles of keys there is capacity for.
    """
    places = device.num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    most = max(1, min(MAX_SPLITS, num_tiles // MIN_TILES))

    def busy(num_splits: int) -> float:
        waves = num_programs * num_splits / places
        return waves / -(-num_programs * num_splits // places)

    best = max(busy(num_splits) for num_splits in range(1, most + 1))
    return next(num_splits for num_splits in range(1, most + 1) if busy(num_splits) >= ENOUGH * best)
