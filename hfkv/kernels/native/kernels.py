"""The native kernels as hfkv calls them: the same arguments and results as the Triton kernels'."""

from __future__ import annotations

from array import array

import torch

from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.device_inputs import DeviceInputs, device_inputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.native.library import loaded, num_threads
from hfkv.stores.layout import Layout

CODECS = {"int8": 2, "fp8": 3, "int4": 4}
PLAIN = {torch.float32: 0, torch.bfloat16: 1}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def code_of(codec: str, dtype: torch.dtype) -> int | None:
    """The number by which the native code knows how tokens of `dtype` are stored; None where it does not."""
    return PLAIN.get(dtype) if codec == "none" else CODECS.get(codec)


def attend(
    query: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    visibility: Visibility,
    scoring: Scoring,
    inputs: DeviceInputs | None = None,
) -> Attended:
    """Attention of few queries `[B, Hq, q, D]` to encoded tokens; see `hfkv.kernels.naive.attention_naive`.

    Args:
        query: fp32, bf16 or fp16.
        keys, values: both written by the same codec; those of none are fp32 or bf16, as the queries.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.
        inputs: layout and visibility as `device_inputs` gives them; made here where they are not given.

    Raises:
        ValueError: the layout names tokens that are not in the planes.
        MemoryError: there is no memory for what is summed.
    """
    key_data, value_data = keys.planes[0], values.planes[0]
    # Keys and values differ under some autocasts; a trace has to see torch's operations.
    if key_data.dtype != value_data.dtype or keys.codec is not values.codec or torch.jit.is_tracing():
        return flash_attention(query, keys, values, layout, visibility, scoring)
    if inputs is None:
        inputs = device_inputs(layout, visibility, query.device)
    batch, num_heads, num_queries, key_width = query.shape
    heads, value_width = key_data.shape[1], values.head_dim
    code = code_of(keys.codec.name, key_data.dtype)
    is_alike = key_width == keys.head_dim and key_data.shape[:3] == value_data.shape[:3] and not num_heads % heads
    rows = batch if inputs.columns else len(key_data)
    if code is None or not is_alike or not batch == rows == inputs.batch:
        raise ValueError(
            f"queries {tuple(query.shape)} of {inputs.batch} rows do not go with {keys.codec.name} keys of width "
            f"{keys.head_dim} in planes of {tuple(key_data.shape)} and {tuple(value_data.shape)}"
        )
    if key_width and query.stride(3) != 1:
        query = query.contiguous()
    out = query.new_empty(batch, num_queries, num_heads, value_width)
    lse = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)
    bounds, mask, logits = inputs.bounds, inputs.mask, scoring.sink_logits
    mask_strides, bounds_stride = [0, 0, 0], 0
    if mask is not None:
        is_long_enough = mask.shape[3] >= layout.length - visibility.first
        _check("masks", mask, (batch, num_heads, num_queries), is_long_enough)
        mask = mask.contiguous()
        mask_strides = [0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(3)]
    if bounds is not None:
        _check("bounds", bounds, (batch, num_queries))
        bounds = bounds.contiguous()
        bounds_stride = bounds.stride(0) if len(bounds) > 1 else 0
    if logits is not None:
        logits = logits.float().contiguous()
    shape = array(
        "q",
        (
            *(batch, inputs.columns, heads, num_heads // heads, num_queries, key_width, value_width),
            *(code, DTYPES[query.dtype], key_data.shape[2], num_threads()),
            *query.stride()[:3],
            *mask_strides,
            *(bounds_stride, key_data.shape[0]),
        ),
    )
    failure = loaded().hfkv_attend(
        *(shape.buffer_info()[0], inputs.meta.data_ptr(), query.data_ptr()),
        *_pointers(keys, values),
        *[0 if given is None else given.data_ptr() for given in (bounds, mask, logits)],
        *(scoring.scale, scoring.softcap or 0.0, out.data_ptr(), lse.data_ptr()),
    )
    if failure == 2:
        raise MemoryError(f"no memory for the sums of attention of queries {tuple(query.shape)}")
    if failure:
        raise ValueError(f"the layout names tokens outside planes of {tuple(key_data.shape)}")
    return Attended(out.transpose(1, 2), lse)


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: Encoded,
    values: Encoded,
    layout: Layout,
    inputs: DeviceInputs | None = None,
) -> None:
    """Encodes tokens `[B, H, n, D]` and writes them behind those held; see `hfkv.kernels.naive.append_naive`.

    Raises:
        ValueError: the planes have no room for them.
        NotImplementedError: under ``torch.jit.trace``.
    """
    if inputs is None:
        inputs = device_inputs(layout.end, None, new_keys.device)
    if not new_keys.shape[2]:
        return
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "a trace does not see what native kernels write; set HFKV_NATIVE=0 before hfkv is used"
        )
    key_data = keys.planes[0]
    # Exact: codecs compute in float32.
    dtype = torch.promote_types(new_keys.dtype, new_values.dtype)
    if new_keys.stride(3) != 1 or new_values.stride(3) != 1 or not dtype == new_keys.dtype == new_values.dtype:
        new_keys, new_values = new_keys.to(dtype).contiguous(), new_values.to(dtype).contiguous()
    batch, key_heads, count, key_width = new_keys.shape
    for new, encoded in ((new_keys, keys), (new_values, values)):
        data = encoded.planes[0]
        rows = len(data) if inputs.columns else batch
        is_alike = data.shape[:3] == (rows, new.shape[1], key_data.shape[2]) and len(data) == len(key_data)
        is_alike = is_alike and new.shape == (batch, new.shape[1], count, encoded.head_dim)
        if not is_alike or (encoded.codec.is_lossless and data.dtype != dtype):
            raise ValueError(f"new tokens {tuple(new.shape)} do not go into planes of {tuple(data.shape)}")
    shape = array(
        "q",
        (
            *(batch, inputs.batch, inputs.columns, count, DTYPES[dtype], key_data.shape[2], len(key_data)),
            *(num_threads(), code_of(keys.codec.name, dtype) or 0, key_heads, key_width, *new_keys.stride()[:3]),
            *(code_of(values.codec.name, dtype) or 0, new_values.shape[1], new_values.shape[3]),
            *new_values.stride()[:3],
        ),
    )
    is_full = loaded().hfkv_append(
        *(shape.buffer_info()[0], inputs.meta.data_ptr(), new_keys.data_ptr(), new_values.data_ptr()),
        *_pointers(keys, values),
    )
    if is_full:
        raise ValueError(f"{new_keys.shape[2]} new tokens find no room in planes of {tuple(key_data.shape)}")


def _check(name: str, given: torch.Tensor, sizes: tuple[int, ...], is_long_enough: bool = True) -> None:
    """Refuses a mask or bounds that are neither one nor all in their dimensions but the last of `sizes`."""
    *free, num_queries = sizes
    fits = all(size in (1, most) for size, most in zip(given.shape, free, strict=False))
    if not fits or given.shape[len(free)] != num_queries or not is_long_enough:
        raise ValueError(f"{name} {tuple(given.shape)} are not for queries of {sizes}")


def _pointers(*parts: Encoded) -> list[int]:
    """Where the data and the scales of keys and of values lie, whose rows the native code finds by itself.

    Raises:
        ValueError: a plane does not lie in one piece.
    """
    pointers = []
    for encoded in parts:
        for plane in encoded.planes:
            if not plane.is_contiguous():
                raise ValueError(f"native kernels take contiguous planes, got strides {plane.stride()}")
            pointers.append(plane.data_ptr())
        if len(encoded.planes) == 1:
            pointers.append(0)
    return pointers
