"""The operator behind `decode_attention` and `prefill_attention`."""

from __future__ import annotations

import torch

from hfkv.kernels.device_inputs import DeviceInputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.operators import Operator
from hfkv.kernels.triton.arguments import pairs_argument, plane_arguments, product_dtypes
from hfkv.kernels.triton.attention import _attention_kernel
from hfkv.kernels.triton.call import Call, outputs
from hfkv.kernels.triton.digits.attention import _digits_kernel
from hfkv.kernels.triton.digits.call import constants as digits_constants
from hfkv.kernels.triton.digits.call import plane_arguments as digits_planes
from hfkv.kernels.triton.digits.call import takes_digits
from hfkv.kernels.triton.mean.tables import mean_arguments
from hfkv.kernels.triton.numbers import rotation
from hfkv.kernels.triton.support import ROTATED
from hfkv.kernels.triton.tiling import columns_of, device_of, digits_tiling, loaded_bytes, padded, tiling
from hfkv.stores.layout import Layout


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
    counters: torch.Tensor | None,
    is_prefill: bool,
    mean: torch.Tensor | None = None,
    waves: torch.Tensor | None = None,
    turns: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    num_pairs: int = 0,
    is_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = outputs(query, value_dim)
    if out.numel() == 0:
        return out, lse
    _, num_heads, num_queries, key_dim = query.shape
    k, v = key_planes[0], value_planes[0]
    num_kv_heads, page_size = k.shape[1], k.shape[2] if columns else 0
    num_rows = num_heads // num_kv_heads * num_queries
    codecs, dims, widths = (key_codec, value_codec), (key_dim, value_dim), (k.shape[3], v.shape[3])
    device = device_of(query.device)
    kernel, dtypes = _attention_kernel, None
    wave_bytes = 0 if waves is None else waves.stride(0) * waves.itemsize
    of_mean = (mean is not None, num_pairs, 16 if waves is None else waves.shape[2], is_interleaved)
    planes: tuple[torch.Tensor | int | None, ...]
    if not is_prefill and takes_digits(query, key_planes, value_planes, codecs, page_size):
        kernel = _digits_kernel
        planes = digits_planes(key_planes, value_planes, codecs)
        constants = (*of_mean, *digits_constants(codecs, dims, widths, query.device))
        k_columns, v_columns = map(columns_of, codecs, dims, widths, (32, 32))
        tiles = digits_tiling(device, num_rows, (k_columns, v_columns), codecs, page_size, wave_bytes)
    else:
        q_padded = padded(key_dim)
        k_padded, v_padded = map(columns_of, codecs, dims, widths)
        dtypes = product_dtypes(query.dtype, value_codec, query.device)
        planes = (*plane_arguments(key_planes), *plane_arguments(value_planes), pairs_argument(codecs, query.device))
        constants = (*of_mean, *codecs, *dims, *widths, q_padded, k_padded, v_padded, *rotation(key_dim))
        tiles = tiling(
            device,
            num_rows,
            (q_padded, padded(value_dim)),
            query.dtype,
            dtypes[1].itemsize,
            loaded_bytes(codecs[0], k_padded, k.element_size()) + loaded_bytes(codecs[1], v_padded, v.element_size()),
            page_size,
            is_prefill=is_prefill,
            wave_bytes=wave_bytes,
        )
    planes = (*planes, mean, waves, turns, places)
    Call(meta, columns, bounds, mask, sink_logits, scale, softcap, capacity, num_splits, counters).launch(
        kernel,
        query,
        planes,
        constants,
        tiles=tiles,
        dtypes=dtypes,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        is_rotated=value_codec in ROTATED,
        out=out,
        lse=lse,
    )
    return out, lse


def _fake(query, key_planes, value_planes, key_codec, value_codec, value_dim, *_):
    return outputs(query, value_dim)


_operator = Operator("attention", _attention, _fake)


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
        ValueError: what `Call.checked` or `mean_arguments` refuses.
    """
    call = Call.checked(query, (keys, values), keys.head_dim, layout, visibility, scoring, inputs, capacity, num_splits)
    of_mean = () if keys.mean is None else mean_arguments(keys, keys.mean, len(query), layout.length, query.dtype)
    out, lse = _operator(
        *(query, list(keys.planes), list(values.planes), keys.codec.name, values.codec.name, values.head_dim),
        *(*call, is_prefill, *of_mean),
    )
    return Attended(out, lse)
