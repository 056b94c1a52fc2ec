"""`expert_linear`: the linear layer of sparse experts, each slot's row through its expert's matrix."""

from __future__ import annotations

from typing import Literal

import torch
import triton

from hfkv.kernels.experts.codes import GROUP, Codes, check_linear, codec_of
from hfkv.kernels.experts.slots import ExpertSlots
from hfkv.kernels.experts.triton_gemm import _gemm_kernel
from hfkv.kernels.experts.triton_gemv import _gemv_kernel
from hfkv.kernels.experts.triton_slots import tile_slots
from hfkv.kernels.experts.triton_tiling import (
    MIN_BLOCK_M,
    choose_block_m,
    gemm_tiling,
    gemv_splits,
    gemv_tiling,
    is_few,
)
from hfkv.kernels.operators import Operator
from hfkv.kernels.triton.arguments import TL_DTYPES, product_dtypes
from hfkv.kernels.triton.tiling import device_of

# Bytes of a group of int4, and of a word of four.
GROUP_BYTES, WORD = GROUP // 2, 4
# How to compute a layer; see `expert_linear`.
Kernel = Literal["gemv", "gemm", "invariant"]
# A part as the operator takes it: weight, scale or units, codes of groups, columns.
Part = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _arguments(part: Part, codec: str) -> tuple[object, ...]:
    """Gives what both kernels take of a part."""
    weight, scale, groups, columns = part
    # The two codes of a group are one load.
    codes = None if groups is None else groups.view(torch.int16)
    strides = weight.stride()
    if codec == "words":
        weight, strides = weight.view(torch.int32), (strides[0] // GROUP_BYTES, strides[1] // GROUP_BYTES, 1)
    return weight, *strides, scale, codes, columns, weight.shape[1]


def _gemv_codec(weight: torch.Tensor, dtype: torch.dtype) -> str:
    """Gives how the GEMV is to read a part: as its codec says, or "words" of int4 where digits are enough for x."""
    codec = codec_of(weight)
    if codec != "int4" or dtype == torch.float32 or weight.data_ptr() % GROUP_BYTES:
        return codec
    return "int4" if any(stride % GROUP_BYTES for stride in weight.stride()[:2]) else "words"


def has_assembly(device: torch.device) -> bool:
    """Says whether kernels on a device may hold instructions of its own: interpreted ones may not."""
    return device.type == "cuda"


def _gemv(
    x: torch.Tensor,
    experts: torch.Tensor,
    parts: list[Part],
    bias: torch.Tensor | None,
    bias_strides: tuple[int, ...],
    out: torch.Tensor,
    num_inputs: int,
    top_k: int,
) -> torch.Tensor:
    """Fills `out` two parts at a time; returns what it filled, or the sum of splits."""
    device, num_slots = device_of(x.device), len(out)
    tilings, tiles, codecs = [], [], []
    for weight, *_ in parts:
        _, rows, width = weight.shape
        is_transposed = weight.stride(2) != 1 and weight.stride(1) == 1
        codecs.append(_gemv_codec(weight, x.dtype))
        item_size = WORD if codecs[-1] == "words" else weight.element_size()
        width = width * weight.element_size() // item_size
        tiling = gemv_tiling(device, num_slots, rows, width, item_size, is_transposed=is_transposed)
        tilings.append(tiling)
        tiles.append((triton.cdiv(rows, tiling.block_n), triton.cdiv(width, tiling.block_k)))
    num_programs = num_slots * sum(row_tiles for row_tiles, _ in tiles)
    splits = gemv_splits(device, num_programs, min(input_tiles for _, input_tiles in tiles))
    filled = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    for first in range(0, len(parts), 2):
        second = first + 1 if first + 1 < len(parts) else first
        codec, programs = codecs[second], [tiles[index][0] * splits for index in (first, second)]
        if second == first:
            codec, programs[1] = "", 0
        _gemv_kernel[(num_slots, sum(programs))](
            *(x, *x.stride(), experts, *_arguments(parts[first], codecs[first])),
            *_arguments(parts[second], codecs[second]),
            *(bias, *bias_strides, filled, num_slots, out.shape[1], parts[0][0].shape[0], programs[0]),
            *(top_k, num_inputs, splits),
            *(codecs[first], tilings[first].block_n, tilings[first].block_k),
            *(codec, tilings[second].block_n, tilings[second].block_k, has_assembly(x.device)),
            num_warps=max(tilings[first].num_warps, tilings[second].num_warps),
            enable_fp_fusion=True,
        )
    return out if splits == 1 else out.copy_(filled.sum(dim=0))


def _gemm(
    x: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    block_m: int,
    parts: list[Part],
    bias: torch.Tensor | None,
    bias_strides: tuple[int, ...],
    out: torch.Tensor,
    num_inputs: int,
    top_k: int,
) -> torch.Tensor:
    """Fills `out`, a launch for each part."""
    dtype = product_dtypes(x.dtype, "none", x.device)[0]
    for part in parts:
        num_experts, rows, _ = part[0].shape
        codec = codec_of(part[0])
        tiling = gemm_tiling(device_of(x.device), block_m, codec, dtype)
        column_tiles = triton.cdiv(rows, tiling.block_n)
        _gemm_kernel[(len(tiles) * column_tiles,)](
            *(x, *x.stride(), order, tiles, *_arguments(part, codec)),
            *(bias, *bias_strides, out, out.shape[1], num_experts, column_tiles),
            *(top_k, num_inputs, codec, TL_DTYPES[dtype], block_m, tiling.block_n, tiling.block_k),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=True,
        )
    return out


def _expert_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    order: torch.Tensor | None,
    tiles: torch.Tensor | None,
    block_m: int,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor | None],
    groups: list[torch.Tensor | None],
    columns: list[torch.Tensor | None],
    bias: torch.Tensor | None,
    num_inputs: int,
    num_outputs: int,
    top_k: int,
) -> torch.Tensor:
    out = x.new_empty(experts.shape[0], num_outputs)
    if out.numel() == 0:
        return out
    # A part without rows would be a launch of no programs.
    parts = [part for part in zip(weights, scales, groups, columns, strict=True) if part[0].shape[1] > 0]
    bias_strides = (0, 0) if bias is None else bias.stride()
    if order is None or tiles is None:
        return _gemv(x, experts, parts, bias, bias_strides, out, num_inputs, top_k)
    return _gemm(x, order, tiles, block_m, parts, bias, bias_strides, out, num_inputs, top_k)


def _fake(x, experts, order, tiles, block_m, weights, scales, groups, columns, bias, num_inputs, num_outputs, top_k):
    return x.new_empty(experts.shape[0], num_outputs)


_operator = Operator("expert_linear", _expert_linear, _fake)


def expert_linear(
    x: torch.Tensor,
    parts: tuple[Codes, ...],
    slots: ExpertSlots,
    num_outputs: int,
    bias: torch.Tensor | None = None,
    *,
    rows_are_slots: bool,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Computes the linear layer of sparse experts as `expert_linear_naive` does, summed up in float32.

    Reads weights as they are stored, per input and output 2 bytes in bf16, one in int8 (and 4 an output) and in int4
    half of one and a sixteenth (and 4 or 8 an output); no copy is written. A GEMV for a few slots reads an
    expert's weights for each of its slots (int4's by integers: a row of half precision in digits of 16 bits, so that a
    number errs by 2^-16 of the largest in its group of 32); a GEMM for more (grouped, as in MegaBlocks, arXiv
    2211.15841) once for up to 16 to 128 slots of an expert. They sum up in different orders, and so do GEMMs of
    different tiles: bits depend on how many slots there are, except with `"invariant"`, a GEMM that always has the same
    tiles.

    Neither waits for the device, and launches depend on shapes alone. There is no gradient.

    Args:
        x: `[T, K]`, or with `rows_are_slots` `[S, K]`; bf16, fp16 or fp32, of any strides. Weights that are floats are
            of the same dtype.
        parts: the experts' matrices, `num_outputs` rows in all, each of which computes its own output.
        slots: which expert each slot goes to; those of no expert get zeros.
        num_outputs: outputs of the layer.
        bias: `[E, num_outputs]`, added in float32; or None.
        rows_are_slots: whether each slot has a row of its own, or reads its token's.
        kernel: `"gemv"`, `"gemm"` or `"invariant"`; None for one of the first two, by the number of slots.

    Returns:
        `[S, num_outputs]` in slot order, of x's dtype.

    Raises:
        ValueError: arguments that do not belong together.
    """
    num_rows = slots.num_slots if rows_are_slots else slots.num_tokens
    check_linear(x, parts, num_rows, slots.num_experts, num_outputs, bias)
    if x.dtype not in TL_DTYPES:
        raise ValueError(f"Triton kernels take bfloat16, float16 and float32, not {x.dtype}")
    if kernel is None:
        kernel = "gemv" if is_few(slots.num_tokens, slots.top_k, slots.num_experts) else "gemm"
    order, tiles, block_m = None, None, 0
    if kernel != "gemv":
        # Exact products hold their factors in registers, on a GPU.
        is_fixed = kernel == "invariant" or (x.dtype == torch.float32 and x.device.type == "cuda")
        block_m = MIN_BLOCK_M if is_fixed else choose_block_m(slots.num_slots, slots.num_experts)
        order, tiles = slots.tiles(block_m, tile_slots)
    return _operator(
        *(x, slots.experts, order, tiles, block_m, [part.weight for part in parts]),
        [part.rows if part.scale is None else part.scale for part in parts],
        *([part.groups for part in parts], [part.columns for part in parts], bias),
        *(parts[0].num_inputs, num_outputs, 1 if rows_are_slots else slots.top_k),
    )
