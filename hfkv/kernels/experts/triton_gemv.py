"""The kernel for a few slots: each reads its expert's weights, once and as they are stored."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

from hfkv.kernels.experts.triton_digits import group_sums, load_digits
from hfkv.kernels.experts.triton_rows import (
    codes_pointers,
    load_bias,
    load_columns,
    load_scale,
    load_units,
    low_inputs,
    split_codes,
)
from hfkv.kernels.triton.numbers import cast


@triton.jit
def _products(
    x_ptr,
    x_k,
    weight_ptr,
    w_n,
    w_k,
    scale_ptr,
    groups_ptr,
    e,
    n,
    is_n,
    num_rows,
    first_block,
    last_block,
    K: tl.constexpr,
    CODEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ASSEMBLY: tl.constexpr,
):
    """Multiplies rows `n` of expert `e` by a row of x, over some blocks of inputs: float32 `[BLOCK_N]`.

    Sums are kept for each place of a tile and added up at the end; int4's are added up by group, and multiplied by
    its step and centre after that: the sum of ((nibble - 8) * step + centre) * x is step * (sum of nibble * x -
    8 * sum of x) + centre * sum of x. Of "words" the nibbles are multiplied by digits of x, four at a time.
    """
    one = tl.arange(0, BLOCK_K)
    rows_at = weight_ptr + n[:, None] * w_n
    if CODEC == "words":
        num_in_block: tl.constexpr = BLOCK_K // 4
        num_in_row: tl.constexpr = (K + 31) // 32
        steps = tl.zeros([BLOCK_N, num_in_block], tl.float32)
        centres = tl.zeros([BLOCK_N, num_in_block], tl.float32)
        for block in range(first_block, last_block):
            word = block * BLOCK_K + one
            w = tl.load(rows_at + word[None, :], mask=is_n[:, None] & (word < num_in_row * 4)[None, :], other=0)
            g = block * num_in_block + tl.arange(0, num_in_block)
            codes_at = codes_pointers(groups_ptr, e, g, n, num_rows, K)
            codes = tl.load(codes_at, mask=is_n[:, None] & (g < num_in_row)[None, :], other=0)
            low_signed, low_rest, high_signed, high_rest, unit, x_sums = load_digits(x_ptr, x_k, word, K, BLOCK_K)
            digits = (low_signed, low_rest, high_signed, high_rest)
            sums = group_sums(w, digits, BLOCK_N, BLOCK_K, HAS_ASSEMBLY).to(tl.float32)
            step_code, centre_code = split_codes(codes)
            steps += step_code * (sums * unit[None, :] - 8.0 * x_sums[None, :])
            centres += centre_code * x_sums[None, :]
        step_unit, centre_unit = load_units(scale_ptr, e, n, is_n, num_rows)
        return tl.sum(steps, 1) * step_unit + tl.sum(centres, 1) * centre_unit
    elif CODEC == "int4":
        num_steps: tl.constexpr = BLOCK_K // 16
        num_groups: tl.constexpr = (K + 31) // 32
        steps = tl.zeros([BLOCK_N, num_steps], tl.float32)
        centres = tl.zeros([BLOCK_N, num_steps], tl.float32)
        for block in range(first_block, last_block):
            byte = block * BLOCK_K + one
            low = low_inputs(byte)
            x_low = tl.load(x_ptr + low * x_k, mask=low < K, other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + (low + 16) * x_k, mask=low + 16 < K, other=0.0).to(tl.float32)
            w = tl.load(rows_at + byte[None, :], mask=is_n[:, None] & (byte < num_groups * 16)[None, :], other=0)
            sums = (w & 0xF).to(tl.int8).to(tl.float32) * x_low[None, :]
            sums += (w >> 4).to(tl.int8).to(tl.float32) * x_high[None, :]
            sums = tl.sum(tl.reshape(sums, (BLOCK_N, num_steps, 16)), 2)
            x_sums = tl.sum(tl.reshape(x_low + x_high, (num_steps, 16)), 1)
            g = block * num_steps + tl.arange(0, num_steps)
            codes_at = codes_pointers(groups_ptr, e, g, n, num_rows, K)
            codes = tl.load(codes_at, mask=is_n[:, None] & (g < num_groups)[None, :], other=0)
            step_code, centre_code = split_codes(codes)
            steps += step_code * (sums - 8.0 * x_sums[None, :])
            centres += centre_code * x_sums[None, :]
        step_unit, centre_unit = load_units(scale_ptr, e, n, is_n, num_rows)
        return tl.sum(steps, 1) * step_unit + tl.sum(centres, 1) * centre_unit
    else:
        sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for block in range(first_block, last_block):
            k = block * BLOCK_K + one
            x = tl.load(x_ptr + k * x_k, mask=k < K, other=0.0).to(tl.float32)
            w_at = rows_at + k.to(tl.int64)[None, :] * w_k
            w = tl.load(w_at, mask=is_n[:, None] & (k < K)[None, :], other=0)
            sums += w.to(tl.float32) * x[None, :]
        out = tl.sum(sums, 1)
        if CODEC == "int8":
            out = out * load_scale(scale_ptr, e, n, is_n, num_rows)
        return out


@triton.jit
def _gemv_tile(
    p,
    slot,
    e,
    is_expert,
    x_ptr,
    x_k,
    weight_ptr,
    w_e,
    w_n,
    w_k,
    scale_ptr,
    groups_ptr,
    columns_ptr,
    num_rows,
    bias_ptr,
    bias_e,
    bias_n,
    out_ptr,
    num_slots,
    num_outputs,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    CODEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ASSEMBLY: tl.constexpr,
):
    """Computes one tile of one part's rows, over one split of the inputs, and stores it where its outputs belong."""
    split = p % SPLITS
    n = (p // SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < num_rows
    n = n.to(tl.int64)
    # Numbers of a row, or its bytes or words of four.
    groups: tl.constexpr = (K + 31) // 32
    width: tl.constexpr = groups * 4 if CODEC == "words" else groups * 16 if CODEC == "int4" else K
    if CODEC == "words":
        # A row's groups of 16 bytes are known to be aligned.
        w_e = w_e * 4
        w_n = w_n * 4
    num_blocks: tl.constexpr = (width + BLOCK_K - 1) // BLOCK_K
    per_split: tl.constexpr = (num_blocks + SPLITS - 1) // SPLITS
    first_block = split * per_split
    # What belongs to no expert is zeros, and reads nothing.
    last_block = tl.where(is_expert, tl.minimum(first_block + per_split, num_blocks), first_block)
    acc = _products(
        x_ptr,
        x_k,
        weight_ptr + e * w_e,
        w_n,
        w_k,
        scale_ptr,
        groups_ptr,
        e,
        n,
        is_n,
        num_rows,
        first_block,
        last_block,
        K,
        CODEC,
        BLOCK_N,
        BLOCK_K,
        HAS_ASSEMBLY,
    )
    column = load_columns(columns_ptr, e, n, is_n, num_rows)
    if bias_ptr is not None:
        # Once, and not to what belongs to no expert.
        acc += load_bias(bias_ptr, bias_e, bias_n, e, column, is_n, is_expert & (split == 0))
    out_at = out_ptr + (split.to(tl.int64) * num_slots + slot) * num_outputs + column
    tl.store(out_at, cast(acc, out_ptr.dtype.element_ty), mask=is_n)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "a_programs"])
def _gemv_kernel(
    x_ptr,
    x_row,
    x_k,
    experts_ptr,
    a_ptr,
    a_e,
    a_n,
    a_k,
    a_scale_ptr,
    a_groups_ptr,
    a_columns_ptr,
    a_rows,
    b_ptr,
    b_e,
    b_n,
    b_k,
    b_scale_ptr,
    b_groups_ptr,
    b_columns_ptr,
    b_rows,
    bias_ptr,
    bias_e,
    bias_n,
    out_ptr,
    num_slots,
    num_outputs,
    num_experts,
    a_programs,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    A_CODEC: tl.constexpr,
    A_BLOCK_N: tl.constexpr,
    A_BLOCK_K: tl.constexpr,
    B_CODEC: tl.constexpr,
    B_BLOCK_N: tl.constexpr,
    B_BLOCK_K: tl.constexpr,
    HAS_ASSEMBLY: tl.constexpr,
):
    """Computes two parts in one launch, because the second is often small; without part b, B_CODEC is ""."""
    # Slots in a row read the same rows of their experts: two of one expert find them in the cache.
    slot = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    expert = tl.load(experts_ptr + slot)
    is_expert = (expert >= 0) & (expert < num_experts)
    e = tl.where(is_expert, expert, 0).to(tl.int64)
    x_ptr += slot // TOP_K * x_row
    # Where the compiler knows that there is no part b, it compiles none.
    if B_CODEC == "" or p < a_programs:
        _gemv_tile(
            *(p, slot, e, is_expert, x_ptr, x_k),
            *(a_ptr, a_e, a_n, a_k, a_scale_ptr, a_groups_ptr, a_columns_ptr, a_rows),
            *(bias_ptr, bias_e, bias_n, out_ptr, num_slots, num_outputs),
            *(K, SPLITS, A_CODEC, A_BLOCK_N, A_BLOCK_K, HAS_ASSEMBLY),
        )
    else:
        _gemv_tile(
            *(p - a_programs, slot, e, is_expert, x_ptr, x_k),
            *(b_ptr, b_e, b_n, b_k, b_scale_ptr, b_groups_ptr, b_columns_ptr, b_rows),
            *(bias_ptr, bias_e, bias_n, out_ptr, num_slots, num_outputs),
            *(K, SPLITS, B_CODEC, B_BLOCK_N, B_BLOCK_K, HAS_ASSEMBLY),
        )
