"""`merge`: the outputs of several splits of the keys made one, and rotated back."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hfkv.kernels.triton.numbers import cast, rotate, rotation

# Rows times splits that a program holds at a time. Not measured on a GPU yet.
BLOCK = 16
MAX_SPLITS = 128
# Splits that the last of their programs merges: it reads them one after the other, where a launch reads all at once.
FEW_SPLITS = 8
# Numbers of parts that it loads at a time.
LOADED = 4096


@triton.jit
def store_joined(lse_ptr, rows, is_row, part_lse):
    """Joins the log-sum-exps `[rows, splits]` of splits, and stores them at `rows`; gives it, 0 where there is none."""
    highest = tl.max(part_lse, 1)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(part_lse - finite[:, None]), 1)
    is_empty = total == 0.0
    lse = finite + tl.log(tl.where(is_empty, 1.0, total))
    tl.store(lse_ptr + rows, tl.where(is_empty, float("-inf"), lse), mask=is_row)
    return lse


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _merge_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    num_splits,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATION: tl.constexpr,
    LOG_ROTATION: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = r < num_rows
    at = r.to(tl.int64)
    num_rows = num_rows.to(tl.int64)

    every = tl.arange(0, MAX_SPLITS)
    exists = is_row[:, None] & (every < num_splits)[None, :]
    part_lse = tl.load(part_lse_ptr + at[:, None] + every[None, :] * num_rows, mask=exists, other=float("-inf"))
    lse = store_joined(lse_ptr, at, is_row, part_lse)

    d = tl.arange(0, PADDED)
    out = tl.zeros([BLOCK_R, PADDED], tl.float32)
    for split in range(0, num_splits, BLOCK_S):
        s = split + tl.arange(0, BLOCK_S)
        valid = is_row[:, None] & (s < num_splits)[None, :]
        rows = at[:, None] + s[None, :] * num_rows
        weights = tl.exp(tl.load(part_lse_ptr + rows, mask=valid, other=float("-inf")) - lse[:, None])
        parts_at = parts_ptr + rows[:, :, None] * D + d[None, None, :]
        parts = tl.load(parts_at, mask=valid[:, :, None] & (d < D)[None, None, :], other=0.0)
        out += tl.sum(weights[:, :, None] * parts, 1)
    if ROTATION > 1:
        out = rotate(out, BLOCK_R, PADDED, ROTATION, LOG_ROTATION)
    out_at = out_ptr + at[:, None] * D + d[None, :]
    tl.store(out_at, cast(out, out_ptr.dtype.element_ty), mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def merge_last(
    targets,
    parts_ptr,
    part_lse_ptr,
    program,
    rows,
    is_row,
    num_rows,
    num_splits,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ROTATION: tl.constexpr,
    LOG_ROTATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FEW: tl.constexpr,
):
    """Merges what the splits of some rows have stored, in the program that comes last; the others do nothing.

    Args:
        targets: where the output, its log-sum-exp and the counters are, which are zero again at the end.
        parts_ptr, part_lse_ptr: what `store_split` wrote, by this program too.
        program: the counter of these rows.
        rows: int64 `[BLOCK_M]`, the rows of the output.
        is_row: `[BLOCK_M]`.
        num_rows: rows of the output, int64.
    """
    out_ptr, lse_ptr, counters_ptr = targets
    # All threads have stored before one counts.
    tl.debug_barrier()
    count = tl.atomic_add(counters_ptr + program, 1, sem="acq_rel", scope="gpu")
    if count == num_splits - 1:
        tl.store(counters_ptr + program, 0)
        every = tl.arange(0, FEW)
        exists = is_row[:, None] & (every < num_splits)[None, :]
        part_lse_at = part_lse_ptr + rows[:, None] + every[None, :] * num_rows
        part_lse = tl.load(part_lse_at, mask=exists, other=float("-inf"), cache_modifier=".cg")
        lse = store_joined(lse_ptr, rows, is_row, part_lse)
        d = tl.arange(0, PADDED)
        out = tl.zeros([BLOCK_M, PADDED], tl.float32)
        for split in range(0, num_splits, BLOCK_S):
            s = split + tl.arange(0, BLOCK_S)
            valid = is_row[:, None] & (s < num_splits)[None, :]
            at = rows[:, None] + s[None, :] * num_rows
            weights = tl.load(part_lse_ptr + at, mask=valid, other=float("-inf"), cache_modifier=".cg")
            weights = tl.exp(weights - lse[:, None])
            parts_at = parts_ptr + at[:, :, None] * D + d[None, None, :]
            valid = valid[:, :, None] & (d < D)[None, None, :]
            parts = tl.load(parts_at, mask=valid, other=0.0, cache_modifier=".cg")
            out += tl.sum(weights[:, :, None] * parts, 1)
        if ROTATION > 1:
            out = rotate(out, BLOCK_M, PADDED, ROTATION, LOG_ROTATION)
        out_at = out_ptr + rows[:, None] * D + d[None, :]
        tl.store(out_at, cast(out, out_ptr.dtype.element_ty), mask=is_row[:, None] & (d < D)[None, :])


def merge(
    parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *, is_rotated: bool
) -> None:
    """Merges splits by their log-sum-exp (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

    Args:
        parts: float32 `[splits, B, Hq, q, Dv]`, contiguous.
        part_lse: float32 `[splits, B, Hq, q]`, contiguous; -inf where a split sees nothing.
        out: `[B, Hq, q, Dv]`, contiguous, to be written to.
        lse: float32 `[B, Hq, q]`, contiguous, to be written to.
        is_rotated: whether the parts are in the rotated basis of int4, int3 and int2.
    """
    num_splits, head_dim = parts.shape[0], parts.shape[4]
    num_rows = lse.numel()
    block_s = min(BLOCK, triton.next_power_of_2(num_splits))
    block_r = BLOCK // block_s
    _merge_kernel[(triton.cdiv(num_rows, block_r),)](
        *(parts, part_lse, out, lse, num_rows, num_splits),
        *(head_dim, triton.next_power_of_2(head_dim), *(rotation(head_dim) if is_rotated else (1, 0))),
        *(1 if num_splits == 1 else MAX_SPLITS, block_r, block_s),
        num_warps=4,
        enable_fp_fusion=True,
    )
