"""The kernel for many slots: tiles of slots of one expert, times tiles of its weights, decoded on the way."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import triton
import triton.language as tl

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
def _decoded_groups(w, step, base, BLOCK_N: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """Decodes nibbles `[BLOCK_N, 16 * G]`, in bytes: nibble * step + base, both of the nibble's group."""
    nibbles = tl.reshape(w.to(tl.int8).to(tl.float32), (BLOCK_N, G, 16))
    return tl.reshape(nibbles * step[:, :, None] + base[:, :, None], (BLOCK_N, G * 16)).to(DTYPE)


@triton.jit(do_not_specialize=["num_experts", "num_column_tiles"])
def _gemm_kernel(
    x_ptr,
    x_row,
    x_k,
    order_ptr,
    tiles_ptr,
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
    num_outputs,
    num_experts,
    num_column_tiles,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run at a time share an expert's rows of x, and then its weights.
    tile = tl.program_id(0) // num_column_tiles
    expert = tl.load(tiles_ptr + 3 * tile)
    if expert < 0:
        return
    m = tl.load(tiles_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    is_m = m < tl.load(tiles_ptr + 3 * tile + 2)
    slot = tl.load(order_ptr + m, mask=is_m, other=0)
    x_rows = x_ptr + (slot // TOP_K).to(tl.int64)[:, None] * x_row
    n = tl.program_id(0) % num_column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < num_rows
    n = n.to(tl.int64)
    # What belongs to no expert is zeros, and reads nothing.
    is_expert = expert < num_experts
    e = tl.where(is_expert, expert, 0).to(tl.int64)
    num_blocks = tl.where(is_expert, (K + BLOCK_K - 1) // BLOCK_K, 0)
    weight_ptr += e * w_e

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    is_even: tl.constexpr = K % BLOCK_K == 0
    if CODEC == "int4":
        num_bytes: tl.constexpr = BLOCK_K // 2
        num_steps: tl.constexpr = BLOCK_K // 32
        num_groups: tl.constexpr = (K + 31) // 32
        step_unit, centre_unit = load_units(scale_ptr, e, n, is_n, num_rows)
        for block in range(0, num_blocks):
            byte = block * num_bytes + tl.arange(0, num_bytes)
            low = low_inputs(byte)
            g = block * num_steps + tl.arange(0, num_steps)
            low_at = x_rows + low[None, :] * x_k
            high_at = x_rows + (low + 16)[None, :] * x_k
            w_at = weight_ptr + n[:, None] * w_n + byte[None, :]
            codes_at = codes_pointers(groups_ptr, e, g, n, num_rows, K)
            if is_even:
                x_low = tl.load(low_at, mask=is_m[:, None], other=0.0)
                x_high = tl.load(high_at, mask=is_m[:, None], other=0.0)
                w = tl.load(w_at, mask=is_n[:, None], other=0)
                codes = tl.load(codes_at, mask=is_n[:, None], other=0)
            else:
                x_low = tl.load(low_at, mask=is_m[:, None] & (low < K)[None, :], other=0.0)
                x_high = tl.load(high_at, mask=is_m[:, None] & (low + 16 < K)[None, :], other=0.0)
                w = tl.load(w_at, mask=is_n[:, None] & (byte < num_groups * 16)[None, :], other=0)
                codes = tl.load(codes_at, mask=is_n[:, None] & (g < num_groups)[None, :], other=0)
            step_code, centre_code = split_codes(codes)
            step = step_code * step_unit[:, None]
            base = centre_code * centre_unit[:, None] - 8.0 * step
            w_low = _decoded_groups(w & 0xF, step, base, BLOCK_N, num_steps, DTYPE)
            w_high = _decoded_groups(w >> 4, step, base, BLOCK_N, num_steps, DTYPE)
            acc = tl.dot(x_low.to(DTYPE), tl.trans(w_low), acc, input_precision="ieee")
            acc = tl.dot(x_high.to(DTYPE), tl.trans(w_high), acc, input_precision="ieee")
    else:
        for block in range(0, num_blocks):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            x_at = x_rows + k[None, :] * x_k
            w_at = weight_ptr + n[None, :] * w_n + k.to(tl.int64)[:, None] * w_k
            if is_even:
                x = tl.load(x_at, mask=is_m[:, None], other=0.0)
                w = tl.load(w_at, mask=is_n[None, :], other=0)
            else:
                x = tl.load(x_at, mask=is_m[:, None] & (k < K)[None, :], other=0.0)
                w = tl.load(w_at, mask=is_n[None, :] & (k < K)[:, None], other=0)
            acc = tl.dot(x.to(DTYPE), w.to(DTYPE), acc, input_precision="ieee")
        if CODEC == "int8":
            acc = acc * load_scale(scale_ptr, e, n, is_n, num_rows)[None, :]

    column = load_columns(columns_ptr, e, n, is_n, num_rows)
    if bias_ptr is not None:
        acc += load_bias(bias_ptr, bias_e, bias_n, e, column, is_n, is_expert)[None, :]
    out_at = out_ptr + slot.to(tl.int64)[:, None] * num_outputs + column[None, :]
    tl.store(out_at, cast(acc, out_ptr.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])
