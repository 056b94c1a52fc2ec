"""A kernel that shows what `tile_ranges` gives, in a file of its own to be imported with the interpreted Triton."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

import triton
import triton.language as tl

from hfkv.kernels.triton.tiles import tile_ranges


@triton.jit(do_not_specialize=list(range(9)))
def ranges_kernel(
    first, length, end_slot, num_slots, held_from, pad, sinks, lowest, t_last, ranges_ptr, BLOCK_N: tl.constexpr
):
    slots_begin, slots_end, sinks_begin, sinks_end, newest_begin, newest_end = tile_ranges(
        first, length, end_slot, num_slots, held_from, pad, sinks, lowest, t_last, BLOCK_N, False
    )
    tl.store(ranges_ptr, slots_begin)
    tl.store(ranges_ptr + 1, slots_end)
    tl.store(ranges_ptr + 2, sinks_begin)
    tl.store(ranges_ptr + 3, sinks_end)
    tl.store(ranges_ptr + 4, newest_begin)
    tl.store(ranges_ptr + 5, newest_end)
