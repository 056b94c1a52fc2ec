"""`tile_slots`: the slots of a forward sorted by expert and cut into tiles, in one launch."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hfkv.kernels.experts.slots import num_tiles
from hfkv.kernels.operators import Operator

# Ids that a program looks at together, and places that it fills. Not measured on a GPU yet.
BLOCK_S = 4096
BLOCK_T = 64


@triton.jit
def _expert_of(experts_ptr, s, num_slots, num_experts):
    """Loads the expert of each slot: E for a slot of no expert, E + 1 where there is no slot."""
    expert = tl.load(experts_ptr + s, mask=s < num_slots, other=0)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    return tl.where(s < num_slots, expert, num_experts + 1)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_tiles"])
def _tile_kernel(
    experts_ptr,
    order_ptr,
    tiles_ptr,
    num_slots,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    e = tl.program_id(0)
    one = tl.arange(0, BLOCK_S)
    lower = tl.zeros([BLOCK_S], tl.int32)
    same = tl.zeros([BLOCK_S], tl.int32)
    for first in range(0, num_slots, BLOCK_S):
        expert = _expert_of(experts_ptr, first + one, num_slots, num_experts)
        lower += (expert < e).to(tl.int32)
        same += (expert == e).to(tl.int32)
    begin = tl.sum(lower, 0)
    end = begin + tl.sum(same, 0)

    place = begin
    for first in range(0, num_slots, BLOCK_S):
        is_mine = (_expert_of(experts_ptr, first + one, num_slots, num_experts) == e).to(tl.int32)
        places = place + tl.cumsum(is_mine, 0) - is_mine
        tl.store(order_ptr + places, first + one, mask=is_mine > 0)
        place += tl.sum(is_mine, 0)

    first_tile = begin // BLOCK_M + e
    last_tile = tl.where(e == num_experts, num_tiles, end // BLOCK_M + e + 1)
    for first in range(first_tile, last_tile, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        low = begin + (tile - first_tile) * BLOCK_M
        is_tile = low < end
        at = tiles_ptr + 3 * tile
        tl.store(at, tl.where(is_tile, e, -1), mask=tile < last_tile)
        tl.store(at + 1, tl.where(is_tile, low, -1), mask=tile < last_tile)
        tl.store(at + 2, tl.where(is_tile, tl.minimum(low + BLOCK_M, end), -1), mask=tile < last_tile)


def _tile_slots(experts: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_slots = len(experts)
    places = num_tiles(num_slots, num_experts, block_m)
    order = experts.new_empty(num_slots, dtype=torch.int32)
    tiles = experts.new_empty(places, 3, dtype=torch.int32)
    _tile_kernel[(num_experts + 1,)](
        *(experts, order, tiles, num_slots, num_experts, places),
        *(block_m, min(BLOCK_S, max(16, triton.next_power_of_2(num_slots))), BLOCK_T),
        num_warps=8 if num_slots > BLOCK_S // 2 else 4,
    )
    return order, tiles


def _fake(experts, num_experts, block_m):
    order = experts.new_empty(experts.shape, dtype=torch.int32)
    return order, order.new_empty(num_tiles(experts.shape[0], num_experts, block_m), 3)


_operator = Operator("tile_slots", _tile_slots, _fake)


def tile_slots(experts: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the numbers of `hfkv.kernels.experts.slots.tile_slots`: a program for each expert reads all ids twice.

    Args:
        experts: `[S]` ids, int64 or int32, contiguous.
        num_experts: E.
        block_m: rows a tile has at most.

    Returns:
        The order int32 `[S]`, and expert, begin and end of each tile, int32 `[num_tiles, 3]`.
    """
    return _operator(experts, num_experts, block_m)
