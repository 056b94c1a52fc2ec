"""The operator behind `decode_attention` and `prefill_attention`: checks, launches and merges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hfkv.codecs.hadamard import hadamard_block
from hfkv.kernels.device_inputs import NUM_SCALARS, DeviceInputs, device_inputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.triton.append import bytes_of
from hfkv.kernels.triton.attention import _attention_kernel
from hfkv.kernels.triton.merge import MAX_SPLITS, merge
from hfkv.kernels.triton.support import unsupported_scoring
from hfkv.kernels.triton.tiling import choose_splits, device_of, tiling
from hfkv.stores.layout import Layout

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def product_dtypes(dtype: torch.dtype, value_codec: str, device: torch.device) -> tuple[torch.dtype, torch.dtype, str]:
    """The dtypes of the two products' factors, for queries of `dtype`, and the precision of the second."""
    if device.type == "cpu":
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        return torch.float32, torch.float32, "ieee"
    if dtype == torch.float16 and value_codec != "none":
        # Weights times scales fall below float16; TF32 has its precision and float32's range.
        return torch.float16, torch.float32, "tf32"
    return dtype, dtype, "ieee"


@torch.library.custom_op("hfkv::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key_planes: list[torch.Tensor],
    value_planes: list[torch.Tensor],
    key_codec: str,
    value_codec: str,
    value_dim: int,
    meta: torch.Tensor,
    columns: int,
    bounds: torch.Tensor | None,
    mask: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    capacity: int,
    num_splits: int,
    is_prefill: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_heads, num_queries, key_dim = query.shape
    out = query.new_empty(batch, num_heads, num_queries, value_dim)
    lse = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query = query if query.stride(3) == 1 else query.contiguous()
    k, v = bytes_of(key_planes[0]), bytes_of(value_planes[0])
    # Without scales their place is taken by the data.
    k_scale, v_scale = (planes[-1] if len(planes) > 1 else planes[0] for planes in (key_planes, value_planes))
    groups = num_heads // k.shape[1]
    rotation = hadamard_block(key_dim)
    page_size = k.shape[2] if columns else 0
    padded = [max(16, triton.next_power_of_2(dim)) for dim in (key_dim, k.shape[3], v.shape[3])]
    k_dtype, v_dtype, v_precision = product_dtypes(query.dtype, value_codec, query.device)
    tiles = tiling(
        device_of(query.device),
        groups * num_queries,
        (padded[0], max(16, triton.next_power_of_2(value_dim))),
        query.dtype,
        v_dtype.itemsize,
        padded[1] * k.element_size() + padded[2] * v.element_size(),
        page_size,
        is_prefill=is_prefill,
    )
    num_row_tiles = triton.cdiv(groups * num_queries, tiles.block_m)
    if num_splits == 0:
        num_programs = num_row_tiles * k.shape[1] * batch
        num_splits = choose_splits(device_of(query.device), num_programs, triton.cdiv(capacity, tiles.block_n))
    is_merged = num_splits > 1 or value_codec == "int4"
    parts = lse.new_empty(num_splits, *out.shape) if is_merged else out
    part_lse = lse.new_empty(num_splits, *lse.shape) if is_merged else lse
    bounds_strides = (0, 0) if bounds is None else bounds.expand(batch, num_queries).stride()
    mask_strides = (0,) * 4 if mask is None else mask.expand(batch, num_heads, num_queries, -1).stride()
    _attention_kernel[(num_row_tiles * num_splits, k.shape[1], batch)](
        *(query, *query.stride()[:3], k, *k.stride()[:3], k_scale, *k_scale.stride()[:3]),
        *(v, *v.stride()[:3], v_scale, *v_scale.stride()[:3]),
        *(meta, columns, bounds, *bounds_strides),
        *(None if mask is None else mask.view(torch.uint8), *mask_strides),
        *(sink_logits, parts, part_lse, num_queries, num_splits, scale, softcap or 1.0),
        *(NUM_SCALARS, bounds is not None, mask is not None, softcap is not None, sink_logits is not None),
        *(key_codec, value_codec, key_dim, value_dim, k.shape[3], v.shape[3], *padded),
        *(rotation, rotation.bit_length() - 1),
        *(groups, page_size, tiles.block_m, tiles.block_n, TL_DTYPES[k_dtype], TL_DTYPES[v_dtype], v_precision),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    if is_merged:
        merge(parts, part_lse, out, lse, is_rotated=value_codec == "int4")
    return out, lse


@_attention.register_fake
def _(query, key_planes, value_planes, key_codec, value_codec, value_dim, *_):
    out = query.new_empty(*query.shape[:3], value_dim)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def checked(
    query: torch.Tensor,
    parts: tuple[Encoded, Encoded],
    key_dim: int,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    inputs: DeviceInputs | None,
    capacity: int | None,
    num_splits: int,
) -> tuple[DeviceInputs, int]:
    """The inputs, uploaded if there are none, and the capacity in tokens of a call whose arguments belong together.

    Args:
        parts: both sets of planes.
        key_dim: the dimensions that queries must have.

    Raises:
        ValueError: shapes that do not belong together, more splits than can be merged, or a scoring that kernels do
            not do.
    """
    reason = unsupported_scoring(scoring)
    if reason is not None:
        raise ValueError(reason)
    batch, num_heads, _, head_dim = query.shape
    data = parts[0].planes[0]
    num_kv_heads = data.shape[1]
    if num_heads % num_kv_heads or head_dim != key_dim or len(visibility.pads) != batch:
        raise ValueError(
            f"queries {tuple(query.shape)} do not go with {num_kv_heads} kv heads of {key_dim} dimensions "
            f"and {len(visibility.pads)} rows"
        )
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}, and at most {MAX_SPLITS} can be merged")
    if any(plane.stride(3) != 1 and plane.shape[3] > 1 for part in parts for plane in part.planes):
        raise ValueError("the numbers of a token must lie side by side in every plane")
    if capacity is None:
        # An eager call is cut for what it reads; a captured one for all that it may come to read.
        capacity = layout.length - visibility.first
        if inputs is not None:
            capacity = data.shape[2] * inputs.columns if layout.is_paged else data.shape[2]
    inputs = device_inputs(layout, visibility, query.device) if inputs is None else inputs
    if inputs.batch != batch:
        raise ValueError(f"inputs for {inputs.batch} rows, with {batch} rows of queries")
    return inputs, capacity


def attend(
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    inputs: DeviceInputs | None,
    *,
    capacity: int | None = None,
    num_splits: int = 1,
    is_prefill: bool,
) -> Attended:
    """Checks what a kernel cannot see, and runs the operator; see `decode_attention` for the arguments.

    Raises:
        ValueError: as `checked` does.
    """
    inputs, capacity = checked(
        query, (keys, values), keys.head_dim, layout, visibility, scoring, inputs, capacity, num_splits
    )
    out, lse = torch.ops.hfkv.attention(
        *(query, list(keys.planes), list(values.planes), keys.codec.name, values.codec.name, values.head_dim),
        *(inputs.meta, inputs.columns, inputs.bounds, inputs.mask),
        *(scoring.sink_logits, scoring.scale, scoring.softcap, capacity, num_splits, is_prefill),
    )
    return Attended(out, lse)
