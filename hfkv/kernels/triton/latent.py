"""`latent_attention`: absorbed queries over latents that are the keys and the values of every head."""

from __future__ import annotations

import torch

from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.operators import Operator
from hfkv.kernels.triton.arguments import pairs_argument, plane_arguments, product_dtypes
from hfkv.kernels.triton.bits.parts import BITS
from hfkv.kernels.triton.call import Call, outputs
from hfkv.kernels.triton.latent_attention import _latent_kernel
from hfkv.kernels.triton.numbers import rotation
from hfkv.kernels.triton.support import ROTATED
from hfkv.kernels.triton.tiling import columns_of, device_of, latent_tiling, loaded_bytes, padded
from hfkv.stores.layout import Layout


def _latent_attention(
    query: torch.Tensor,
    latent_planes: list[torch.Tensor],
    rotary_planes: list[torch.Tensor],
    codec: str,
    rotary_codec: str,
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
    counters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = outputs(query, latent_dim)
    if out.numel() == 0:
        return out, lse
    _, num_heads, num_queries, query_dim = query.shape
    c, r = latent_planes[0], rotary_planes[0]
    codecs, page_size = (codec, rotary_codec), c.shape[2] if columns else 0
    dims, widths = (latent_dim, query_dim - latent_dim), (c.shape[3], r.shape[3])
    q_padded, data_padded = [padded(dim) for dim in dims], [*map(columns_of, codecs, dims, widths)]
    dtypes = product_dtypes(query.dtype, codec, query.device)
    tiles = latent_tiling(
        device_of(query.device),
        num_heads * num_queries,
        (q_padded[0], q_padded[1]),
        query.dtype,
        dtypes[1].itemsize,
        sum(map(loaded_bytes, codecs, data_padded, (c.element_size(), r.element_size()))),
        page_size,
        codec in BITS,
    )
    Call(meta, columns, bounds, mask, sink_logits, scale, softcap, capacity, num_splits, counters).launch(
        _latent_kernel,
        query,
        (
            *plane_arguments(latent_planes, has_heads=False),
            *plane_arguments(rotary_planes, has_heads=False),
            pairs_argument(codecs, query.device),
        ),
        (codec, rotary_codec, *dims, *widths, *q_padded, *data_padded, *rotation(dims[0]), *rotation(dims[1])),
        tiles=tiles,
        dtypes=dtypes,
        num_kv_heads=1,
        page_size=page_size,
        is_rotated=codec in ROTATED,
        out=out,
        lse=lse,
    )
    return out, lse


def _fake(query, latent_planes, rotary_planes, codec, rotary_codec, latent_dim, *_):
    return outputs(query, latent_dim)


_operator = Operator("latent_attention", _latent_attention, _fake)


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
    half a byte (and 8) in int4, three or two bits (and 2 or 4 bytes) in int3 and int2; the query and the output make up
    for the rotation of these (QuaRot, arXiv 2404.00456).

    Args:
        query: `[B, Hq, q, r + dr]`, bf16, fp16 or fp32: the part that goes with latents first.
        latents: encoded `[B, 1, T, r]`.
        rotary: encoded `[B, 1, T, dr]`, by the same codec or another, in the same rows.
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
        ValueError: shapes that do not belong together, or a scoring that kernels do not do.
    """
    shapes = [tuple(part.planes[0].shape[:3]) for part in (latents, rotary)]
    if shapes[0] != shapes[1] or shapes[0][1] != 1:
        raise ValueError(f"latents {shapes[0]} and rotary keys {shapes[1]} are not one kv head in the same rows")
    if latents.mean is not None or rotary.mean is not None:
        raise ValueError("the Triton kernel of latents knows of no mean that was taken off them")
    num_splits = 0 if num_splits is None else num_splits
    key_dim = latents.head_dim + rotary.head_dim
    call = Call.checked(
        *(query, (latents, rotary), key_dim, layout, visibility, scoring, inputs, capacity, num_splits), merges=False
    )
    out, lse = _operator(
        *(query, list(latents.planes), list(rotary.planes), latents.codec.name, rotary.codec.name),
        *(latents.head_dim, *call),
    )
    return Attended(out, lse)
