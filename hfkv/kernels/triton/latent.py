"""`latent_attention`: absorbed queries over latents that are the keys and the values of every head."""

from __future__ import annotations

import torch
import triton

from hfkv.codecs.hadamard import hadamard_block
from hfkv.kernels.device_inputs import NUM_SCALARS, DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.triton.append import bytes_of
from hfkv.kernels.triton.latent_attention import _latent_kernel
from hfkv.kernels.triton.merge import merge
from hfkv.kernels.triton.operator import TL_DTYPES, checked, product_dtypes
from hfkv.kernels.triton.tiling import choose_splits, device_of, latent_tiling
from hfkv.stores.layout import Layout


@torch.library.custom_op("hfkv::latent_attention", mutates_args=())
def _latent_attention(
    query: torch.Tensor,
    latent_planes: list[torch.Tensor],
    rotary_planes: list[torch.Tensor],
    codec: str,
    latent_dim: int,
    meta: torch.Tensor,
    columns: int,
    bounds: torch.Tensor | None,
    mask: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    capacity: int,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_heads, num_queries, query_dim = query.shape
    out = query.new_empty(batch, num_heads, num_queries, latent_dim)
    lse = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query = query if query.stride(3) == 1 else query.contiguous()
    c, r = bytes_of(latent_planes[0]), bytes_of(rotary_planes[0])
    # Without scales their place is taken by the data.
    c_scale, r_scale = (planes[-1] if len(planes) > 1 else planes[0] for planes in (latent_planes, rotary_planes))
    page_size = c.shape[2] if columns else 0
    dims = (latent_dim, query_dim - latent_dim)
    widths = (c.shape[3], r.shape[3])
    padded = [max(16, triton.next_power_of_2(dim)) for dim in (*dims, *widths)]
    blocks = [hadamard_block(dim) for dim in dims]
    k_dtype, v_dtype, v_precision = product_dtypes(query.dtype, codec, query.device)
    num_rows = num_heads * num_queries
    device = device_of(query.device)
    token_bytes = (padded[2] + padded[3]) * c.element_size()
    tiles = latent_tiling(
        device, num_rows, (padded[0], padded[1]), query.dtype, v_dtype.itemsize, token_bytes, page_size
    )
    num_row_tiles = triton.cdiv(num_rows, tiles.block_m)
    if num_splits == 0:
        num_splits = choose_splits(device, num_row_tiles * batch, triton.cdiv(capacity, tiles.block_n))
    is_merged = num_splits > 1 or codec == "int4"
    parts = lse.new_empty(num_splits, *out.shape) if is_merged else out
    part_lse = lse.new_empty(num_splits, *lse.shape) if is_merged else lse
    bounds_strides = (0, 0) if bounds is None else bounds.expand(batch, num_queries).stride()
    mask_strides = (0,) * 4 if mask is None else mask.expand(batch, num_heads, num_queries, -1).stride()
    _latent_kernel[(num_row_tiles * num_splits, 1, batch)](
        *(query, *query.stride()[:3], c, c.stride(0), c.stride(2), c_scale, c_scale.stride(0), c_scale.stride(2)),
        *(r, r.stride(0), r.stride(2), r_scale, r_scale.stride(0), r_scale.stride(2)),
        *(meta, columns, bounds, *bounds_strides),
        *(None if mask is None else mask.view(torch.uint8), *mask_strides),
        *(sink_logits, parts, part_lse, num_queries, num_splits, scale, softcap or 1.0),
        *(NUM_SCALARS, bounds is not None, mask is not None, softcap is not None, sink_logits is not None),
        *(codec, *dims, *widths, *padded),
        *(number for block in blocks for number in (block, block.bit_length() - 1)),
        *(num_heads, page_size, tiles.block_m, tiles.block_n, TL_DTYPES[k_dtype], TL_DTYPES[v_dtype], v_precision),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    if is_merged:
        merge(parts, part_lse, out, lse, is_rotated=codec == "int4")
    return out, lse


@_latent_attention.register_fake
def _(query, latent_planes, rotary_planes, codec, latent_dim, *_):
    out = query.new_empty(*query.shape[:3], latent_dim)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def latent_attention(
    query: torch.Tensor,
    latents: Encoded,
    rotary: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    *,
    inputs: DeviceInputs | None = None,
    capacity: int | None = None,
    num_splits: int | None = None,
) -> Attended:
    """Attention of absorbed queries to encoded latents: what `latent_attention_naive` computes.

    Split-KV flash decoding over latents (DeepSeek-V2, arXiv 2405.04434): all query heads share them, so that the rows
    of a tile are pairs of a query and a head, and the values are the keys. What is held is read as it is stored and
    once a tile of rows, per token r + dr numbers: 2 bytes each as bf16, one (and 4 bytes of scales) in int8 and fp8,
    half a byte (and 8) in int4, whose rotation (QuaRot, arXiv 2404.00456) the query and the output make up for.

    Args:
        query: `[B, Hq, q, r + dr]`, bf16, fp16 or fp32: the part that goes with latents first.
        latents: encoded `[B, 1, T, r]`.
        rotary: encoded `[B, 1, T, dr]`, by the same codec and in the same rows.
        layout: where the held tokens lie.
        visibility: which of them each query sees.
        scoring: scale, softcap and sink logits.
        inputs: layout and visibility on the device, for captured graphs; None to upload them. What kernels read is in
            there: of `layout` and `visibility` only what does not change is used then.
        capacity: tokens to choose the number of splits for; None for those held, or with `inputs` for all there is room
            for.
        num_splits: splits; None to choose.

    Returns:
        The output `[B, Hq, q, r]` of the query's dtype, zeros where a query sees nothing, and the log-sum-exp of its
        scores `[B, Hq, q]` float32, -inf there.

    Raises:
        ValueError: shapes or codecs that do not belong together, or a scoring that kernels do not do.
    """
    if latents.codec is not rotary.codec:
        raise ValueError(f"latents in {latents.codec.name} do not go with rotary keys in {rotary.codec.name}")
    shapes = [tuple(part.planes[0].shape[:3]) for part in (latents, rotary)]
    if shapes[0] != shapes[1] or shapes[0][1] != 1:
        raise ValueError(f"latents {shapes[0]} and rotary keys {shapes[1]} are not one kv head in the same rows")
    num_splits = 0 if num_splits is None else num_splits
    key_dim = latents.head_dim + rotary.head_dim
    inputs, capacity = checked(
        query, (latents, rotary), key_dim, layout, visibility, scoring, inputs, capacity, num_splits
    )
    out, lse = torch.ops.hfkv.latent_attention(
        *(query, list(latents.planes), list(rotary.planes), latents.codec.name, latents.head_dim),
        *(inputs.meta, inputs.columns, inputs.bounds, inputs.mask),
        *(scoring.sink_logits, scoring.scale, scoring.softcap, capacity, num_splits),
    )
    return Attended(out, lse)
