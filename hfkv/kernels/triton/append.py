"""`append`: new tokens encoded and written where a cache keeps them, in one pass."""

# ruff: noqa: N803 - Triton writes compile-time constants in capitals
# mypy: allow-incomplete-defs
# Triton annotates nothing else.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hfkv.kernels.device_inputs import NUM_SCALARS, DeviceInputs, device_inputs, is_ragged
from hfkv.kernels.inputs import Encoded
from hfkv.kernels.operators import Operator
from hfkv.kernels.triton.arguments import plane_arguments
from hfkv.kernels.triton.bits.levels import write_levels
from hfkv.kernels.triton.bits.parts import BITS, rows_together
from hfkv.kernels.triton.bits.trellis import bytes_of_paths, numbers_of_windows, write_string
from hfkv.kernels.triton.numbers import cast, fp8_bits, rotate, rotation, round_bf16, round_half_even
from hfkv.kernels.triton.tiles import load_layout
from hfkv.stores.layout import Layout

# Tokens a program. Not measured on a GPU yet.
BLOCK_T = 16
# Bytes for the paths of a launch through the trellis: longer prompts are several launches.
PATHS = 64 << 20


@triton.jit
def _scale(largest, STEPS: tl.constexpr):
    """Computes the scale that `hfkv.codecs.base.scale_for` gives, as float32."""
    scale = round_bf16(largest * (1.0 / STEPS))
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _row_nan(x):
    """Says of each row whether it has a NaN, which maxima pass over."""
    return tl.max((x != x).to(tl.int32), 1) > 0


@triton.jit
def _encode(
    new_ptr,
    new_t,
    new_d,
    n,
    is_new,
    data_ptr,
    data_rows,
    data_d,
    scale_ptr,
    scale_rows,
    numbers_ptr,
    paths_ptr,
    CODEC: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Encodes tokens `n` of one row and head, and stores them at `data_rows`, `data_d` apart, and `scale_rows`.

    `numbers_ptr` and `paths_ptr` are what `write_string` takes.
    """
    d = tl.arange(0, WIDTH)
    valid = is_new[:, None] & (d < D)[None, :]
    new_at = new_ptr + n.to(tl.int64)[:, None] * new_t + d.to(tl.int64)[None, :] * new_d
    x = tl.load(new_at, mask=valid, other=0.0)
    data_at = data_ptr + data_rows[:, None] + d.to(tl.int64)[None, :] * data_d
    if CODEC == "none":
        if x.dtype == data_ptr.dtype.element_ty:
            tl.store(data_at, x, mask=valid)
        else:
            tl.store(data_at, cast(x.to(tl.float32), data_ptr.dtype.element_ty), mask=valid)
    elif CODEC == "int3":
        y = rotate(x.to(tl.float32), BLOCK_T, WIDTH, BLOCK, LOG_BLOCK)
        write_levels(y, data_rows, data_d, scale_ptr + scale_rows, is_new, data_ptr, D, BLOCK_T, WIDTH)
    elif CODEC == "int2":
        y = rotate(x.to(tl.float32), BLOCK_T, WIDTH, BLOCK, LOG_BLOCK)
        given = numbers_ptr, paths_ptr
        write_string(y, data_rows, data_d, scale_ptr + scale_rows, is_new, data_ptr, *given, D, BLOCK_T, WIDTH)
    elif CODEC == "int4":
        y = rotate(x.to(tl.float32), BLOCK_T, WIDTH, BLOCK, LOG_BLOCK)
        least = tl.min(tl.where((d < D)[None, :], y, float("inf")), 1)
        largest = tl.max(tl.where((d < D)[None, :], y, float("-inf")), 1)
        low = round_bf16(tl.where(_row_nan(y), float("nan"), least + 0.0))
        scale = _scale(largest - low, 15)
        steps = tl.div_rn(y - low[:, None], tl.broadcast_to(scale[:, None], (BLOCK_T, WIDTH)))
        steps = tl.where((steps == steps) & (d < D)[None, :], steps, 0.0)
        q = tl.minimum(tl.maximum(round_half_even(steps), 0.0), 15.0).to(tl.int32)
        half: tl.constexpr = (D + 1) // 2
        byte = tl.arange(0, WIDTH)
        upper = tl.broadcast_to(tl.minimum(byte + half, WIDTH - 1)[None, :], (BLOCK_T, WIDTH))
        packed = q | (tl.where((byte + half < D)[None, :], tl.gather(q, upper, 1), 0) << 4)
        tl.store(data_at, packed.to(tl.uint8), mask=is_new[:, None] & (byte < half)[None, :])
        tl.store(scale_ptr + scale_rows, cast(scale, tl.bfloat16), mask=is_new)
        tl.store(scale_ptr + scale_rows + 1, cast(low, tl.bfloat16), mask=is_new)
    else:
        x = x.to(tl.float32)
        largest = tl.where(_row_nan(x), float("nan"), tl.max(tl.abs(x), 1))
        limit: tl.constexpr = 127.0 if CODEC == "int8" else 448.0
        scale = _scale(largest, limit)
        q = tl.div_rn(x, tl.broadcast_to(scale[:, None], (BLOCK_T, WIDTH)))
        if CODEC == "int8":
            # What NaN casts to is not defined; the scale tells.
            q = round_half_even(tl.where(q == q, q, 0.0))
            tl.store(data_at, tl.minimum(tl.maximum(q, -limit), limit).to(tl.int8), mask=valid)
        else:
            tl.store(data_at, fp8_bits(tl.where(q == q, tl.minimum(tl.maximum(q, -limit), limit), q)), mask=valid)
        tl.store(scale_ptr + scale_rows, cast(scale, tl.bfloat16), mask=is_new)


@triton.jit(
    do_not_specialize=[
        "k_scale_b",
        "k_scale_h",
        "v_scale_b",
        "v_scale_h",
        "num_columns",
        "first_new",
        "num_new",
        "capacity",
    ]
)
def _append_kernel(
    keys_ptr,
    keys_b,
    keys_h,
    keys_t,
    keys_d,
    values_ptr,
    values_b,
    values_h,
    values_t,
    values_d,
    k_ptr,
    k_b,
    k_h,
    k_t,
    k_d,
    k_scale_ptr,
    k_scale_b,
    k_scale_h,
    k_scale_t,
    v_ptr,
    v_b,
    v_h,
    v_t,
    v_d,
    v_scale_ptr,
    v_scale_b,
    v_scale_h,
    v_scale_t,
    meta_ptr,
    num_columns,
    first_new,
    num_new,
    capacity,
    numbers_ptr,
    paths_ptr,
    K_CODEC: tl.constexpr,
    V_CODEC: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_LOG_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_LOG_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    META: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PATHS: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if PATHS > 0:
        paths_ptr += ((b * tl.num_programs(1) + h) * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_T * PATHS)
    n = first_new + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start, length, end_slot, _, table_ptr = load_layout(meta_ptr, b, num_columns, META, PAGE_SIZE, IS_RAGGED)
    if PAGE_SIZE == 0:
        block = b + tl.zeros([BLOCK_T], tl.int64)
        slot = start + length + n
        is_new = (n < num_new) & (slot < capacity)
    else:
        behind = end_slot + n
        column = behind // PAGE_SIZE
        slot = behind % PAGE_SIZE
        is_new = (n < num_new) & (column < num_columns)
        block = tl.load(table_ptr + column, mask=is_new, other=0).to(tl.int64)
    slot = slot.to(tl.int64)
    _encode(
        keys_ptr + b * keys_b + h * keys_h,
        keys_t,
        keys_d,
        n,
        is_new,
        k_ptr,
        block * k_b + h * k_h + slot * k_t,
        k_d,
        k_scale_ptr,
        block * k_scale_b + h * k_scale_h + slot * k_scale_t,
        numbers_ptr,
        paths_ptr,
        K_CODEC,
        DK,
        K_WIDTH,
        K_BLOCK,
        K_LOG_BLOCK,
        BLOCK_T,
    )
    _encode(
        values_ptr + b * values_b + h * values_h,
        values_t,
        values_d,
        n,
        is_new,
        v_ptr,
        block * v_b + h * v_h + slot * v_t,
        v_d,
        v_scale_ptr,
        block * v_scale_b + h * v_scale_h + slot * v_scale_t,
        numbers_ptr,
        paths_ptr,
        V_CODEC,
        DV,
        V_WIDTH,
        V_BLOCK,
        V_LOG_BLOCK,
        BLOCK_T,
    )


def _append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    key_planes: list[torch.Tensor],
    value_planes: list[torch.Tensor],
    key_codec: str,
    value_codec: str,
    meta: torch.Tensor,
    columns: int,
    is_paged: bool,
) -> None:
    batch, num_heads, num_new, _ = new_keys.shape
    if new_keys.numel() == 0:
        return
    room = key_planes[0].shape[2]
    dims = (new_keys.shape[3], new_values.shape[3])
    block_t, at_once, paths, warps = BLOCK_T, num_new, 0, 4
    numbers, room_for_paths = None, None
    if key_codec in BITS or value_codec in BITS:
        block_t, warps = rows_together(new_keys.device), 1
    if "int2" in (key_codec, value_codec):
        paths = bytes_of_paths(max(dims))
        at_once = max(block_t, PATHS // (batch * num_heads * paths) // block_t * block_t)
        numbers = numbers_of_windows(new_keys.device)
        programs = batch * num_heads * triton.cdiv(min(at_once, num_new), block_t)
        room_for_paths = numbers.new_empty(programs * block_t * paths, dtype=torch.uint8)
    for first in range(0, num_new, at_once):
        count = min(at_once, num_new - first)
        _append_kernel[(triton.cdiv(count, block_t), num_heads, batch)](
            *(new_keys, *new_keys.stride(), new_values, *new_values.stride()),
            *(*plane_arguments(key_planes), *plane_arguments(value_planes)),
            *(meta, columns, first, first + count, room, numbers, room_for_paths, key_codec, value_codec, *dims),
            *(*map(triton.next_power_of_2, dims), *rotation(dims[0]), *rotation(dims[1])),
            *(room if is_paged else 0, NUM_SCALARS, is_ragged(meta, batch, columns), block_t, paths),
            num_warps=warps,
            # A fused multiply-add rounds once where the codecs round twice.
            enable_fp_fusion=False,
        )


_operator = Operator("append", _append, lambda *_: None, mutates_args=("key_planes", "value_planes"))


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    *,
    inputs: DeviceInputs | None = None,
) -> None:
    """Encodes `[B, H, n, D]` and writes it behind the `layout.length` tokens held, in place: `append_naive`'s bytes.

    Keys and values are one launch, whatever their codecs, and no other is needed.
    Reads D numbers of a key and of a value, and writes what their codecs make of them: D + 2 bytes in int8 and fp8,
    D / 2 + 4 in int4 (rotation: QuaRot, arXiv 2404.00456), 3 D / 8 + 1 in int3, D / 4 + 2 in int2. Rows of int2 are
    found by Viterbi's algorithm, whose paths take D / 4 * 64 bytes of memory each until they are followed.

    Args:
        new_keys, new_values: `[B, H, n, Dk]` and `[B, H, n, Dv]`, bf16, fp16 or fp32, of any strides.
        keys, values: the planes to write to; data of any strides, scales and offsets of a token side by side.
        layout: where the tokens held so far are; a paged one's table has the columns that the new tokens need.
        inputs: the layout on the device, for captured graphs; None to upload it.

    Raises:
        ValueError: there is no room behind the tokens held.
    """
    count = new_keys.shape[2]
    if layout.table is None:
        room = keys.planes[0].shape[2] - layout.start - layout.length
    else:
        page_size = keys.planes[0].shape[2]
        used = (len(layout.spans) - 1) * page_size + layout.spans[-1][1] if layout.spans else 0
        room = layout.table.shape[1] * page_size - used
    if count > room:
        raise ValueError(f"{count} new tokens, with room for {room}")
    inputs = device_inputs(layout, None, new_keys.device) if inputs is None else inputs
    _operator(
        *(new_keys, new_values, list(keys.planes), list(values.planes), keys.codec.name, values.codec.name),
        *(inputs.meta, inputs.columns, layout.is_paged),
    )
