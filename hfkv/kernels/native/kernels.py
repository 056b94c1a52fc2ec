"""The native kernels as hfkv calls them: the same arguments and results as the Triton kernels'."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from hfkv.kernels.cpu.flash import flash_attention
from hfkv.kernels.device_inputs import DeviceInputs, device_inputs
from hfkv.kernels.inputs import Encoded, Scoring, Visibility
from hfkv.kernels.merge import Attended
from hfkv.kernels.native.library import loaded, num_threads
from hfkv.kernels.native.wave_tables import WaveTables
from hfkv.stores.layout import Layout

CODECS = {"int8": 2, "fp8": 3, "int4": 4, "int3": 5, "int2": 6}
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
        keys, values: encoded keys and values; plain ones are fp32 or bf16.
        layout: places of the held tokens in the planes.
        visibility: tokens that each query sees.
        scoring: treatment of the scores.
        inputs: layout and visibility as `device_inputs` gives them; made here where they are not given.

    Raises:
        ValueError: the layout names tokens that are not in the planes.
        MemoryError: there is no memory for what is summed.
    """
    if is_for_torch(keys, values):
        return flash_attention(query, keys, values, layout, visibility, scoring)
    if query.shape[3] and query.stride(3) != 1:
        query = query.contiguous()
    of_step = StepAttention(query, keys, values, layout, visibility, scoring, inputs)
    vector = None if keys.mean is None else keys.mean.mean.vector
    out = of_step.run(query, (*keys.planes, *values.planes), scoring.scale, vector)
    return Attended(out.transpose(1, 2), of_step.lse)


def step_attention(query: torch.Tensor, keys: Encoded, values: Encoded, *given: Any, **inputs: Any) -> Any:
    """`StepAttention`, or None where `attend` has more to do than to call the native code."""
    is_odd = is_for_torch(keys, values) or query.stride(3) != 1
    return None if is_odd else StepAttention(query, keys, values, *given, **inputs)


def is_for_torch(keys: Encoded, values: Encoded) -> bool:
    """Whether torch's operations attend: under a trace, and some autocasts, where plain values are of another dtype."""
    return code_of(values.codec.name, values.planes[0].dtype) is None or torch.jit.is_tracing()


class StepAttention:
    """Attention of queries of one shape to tokens that lie alike: what its calls share, worked out once.

    Args:
        query, keys, values, layout, visibility, scoring, inputs: the arguments of the first call, as `attend` takes
            them.
        is_latent: whether the keys are latents, which are the values too, and the values the rotary keys beside them:
            as `hfkv.kernels.native.latent.attend_latents` takes them.

    Attributes:
        lse: log-sum-exp of the last call, `[B, Hq, q]`.

    Raises:
        ValueError: the arguments do not go together.
    """

    __slots__ = ("_alike", "_given", "_inputs", "_num_keys", "_out", "_shape", "_softcap", "_start", "_vector", "lse")

    def __init__(
        self,
        query: torch.Tensor,
        keys: Encoded,
        values: Encoded,
        layout: Layout,
        visibility: Visibility,
        scoring: Scoring,
        inputs: DeviceInputs | None,
        is_latent: bool = False,
    ) -> None:
        key_data, value_data = keys.planes[0], values.planes[0]
        inputs = inputs or device_inputs(layout, visibility, query.device)
        _refuse_ragged(inputs)
        batch, num_heads, num_queries, query_width = query.shape
        heads, key_width, value_width, rotary_width = key_data.shape[1], keys.head_dim, values.head_dim, 0
        if is_latent:
            value_width, rotary_width = key_width, value_width
        code, value_code = (code_of(part.codec.name, part.planes[0].dtype) for part in (keys, values))
        is_alike = query_width == key_width + rotary_width and key_data.shape[:3] == value_data.shape[:3]
        is_alike = is_alike and not num_heads % heads
        rows = batch if inputs.columns else len(key_data)
        if code is None or value_code is None or not is_alike or not batch == rows == inputs.batch:
            raise ValueError(
                f"queries {tuple(query.shape)} of {inputs.batch} rows do not go with {keys.codec.name} keys of width "
                f"{key_width + rotary_width} in planes of {tuple(key_data.shape)} and {tuple(value_data.shape)}"
            )
        if is_latent and keys.mean is not None:
            raise ValueError("native kernels know of no mean that was taken off latents")
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
        placed = (None, None) if keys.mean is None else WaveTables.placed(keys.mean, batch, layout.length)
        self._vector = None if keys.mean is None else torch.Size((heads, key_width))
        self._alike, self._num_keys = (query.stride(), key_data.shape), len(keys.planes)
        self._shape = array(
            "q",
            (
                *(batch, inputs.columns, heads, num_heads // heads, num_queries, key_width, value_width),
                *(code, DTYPES[query.dtype], key_data.shape[2], num_threads()),
                *query.stride()[:3],
                *mask_strides,
                *(bounds_stride, key_data.shape[0], rotary_width, value_code),
            ),
        )
        self._start = self._shape.buffer_info()[0], inputs.meta.data_ptr()
        self._inputs = inputs, bounds, mask, logits, *placed  # what is pointed to stays
        self._given = [0 if given is None else given.data_ptr() for given in self._inputs[1:]]
        self._softcap = scoring.softcap or 0.0
        self._out = (batch, num_queries, num_heads, value_width), query.dtype
        self.lse = query.new_empty(batch, num_heads, num_queries, dtype=torch.float32)

    def takes(self, query: torch.Tensor, planes: Sequence[torch.Tensor]) -> bool:
        """Whether queries of the first ones' shape, and planes of the same codecs, lie in memory as the first ones."""
        return (query.stride(), planes[0].shape) == self._alike

    def run(
        self, query: torch.Tensor, planes: Sequence[torch.Tensor], scale: float, vector: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output `[B, q, Hq, D]` of queries and planes that it takes; `vector` is their `KeyMean.vector`.

        Raises:
            ValueError: the layout names tokens that are not in the planes, or the keys have a mean where the first
                ones had none, or one of another shape.
            MemoryError: there is no memory for what is summed.
        """
        size, dtype = self._out
        shape = None if vector is None else vector.shape
        if shape != self._vector:
            raise ValueError(f"keys have a mean of shape {shape}, the first ones of this step of {self._vector}")
        out = torch.empty(size, dtype=dtype)
        failure = loaded().hfkv_attend(
            *self._start, query.data_ptr(), *_pointers(planes, self._num_keys),
            *self._given, 0 if vector is None else vector.data_ptr(),
            scale, self._softcap, out.data_ptr(), self.lse.data_ptr(),
        )  # fmt: skip
        if failure == 2:
            raise MemoryError(f"no memory for the sums of attention of queries {tuple(query.shape)}")
        if failure == 3:
            raise ValueError("tokens stand beyond the positions that the layout had at first")
        if failure:
            raise ValueError(f"the layout names tokens outside planes of {tuple(planes[0].shape)}")
        return out


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
    if not new_keys.shape[2]:
        return
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "a trace does not see what native kernels write; set HFKV_NATIVE=0 before hfkv is used"
        )
    if new_keys.dtype != new_values.dtype and keys.codec.is_lossless != values.codec.is_lossless:
        # Plain tokens stay in their dtype, which is another under some autocasts: one side at a time.
        for new, encoded in ((new_keys, keys), (new_values, values)):
            none = encoded._replace(planes=tuple(plane[:, :0] for plane in encoded.planes))
            append(new, new[:, :0], encoded, none, layout, inputs)
        return
    # Exact: codecs compute in float32.
    dtype = torch.promote_types(new_keys.dtype, new_values.dtype)
    if new_keys.stride(3) != 1 or new_values.stride(3) != 1 or not dtype == new_keys.dtype == new_values.dtype:
        new_keys, new_values = new_keys.to(dtype).contiguous(), new_values.to(dtype).contiguous()
    of_step = StepAppend(new_keys, new_values, keys, values, layout, inputs)
    of_step.run(new_keys, new_values, (*keys.planes, *values.planes))


def step_append(new_keys: torch.Tensor, new_values: torch.Tensor, *given: Any, **inputs: Any) -> Any:
    """`StepAppend`, or None where `append` has more to do than to call the native code."""
    is_odd = new_keys.dtype != new_values.dtype or new_keys.stride(3) != 1 or new_values.stride(3) != 1
    return None if is_odd or torch.jit.is_tracing() else StepAppend(new_keys, new_values, *given, **inputs)


class StepAppend:
    """Encoding and writing of tokens of one shape to the same places: what its calls share, worked out once.

    Args:
        new_keys, new_values, keys, values, layout, inputs: the arguments of the first call, as `append` takes them.
        moved: number of the tokens at the front of contiguous planes that move to where the layout says, before the new
            ones are written, and by how many slots.

    Raises:
        ValueError: the tokens do not go into the planes.
    """

    __slots__ = ("_alike", "_inputs", "_num_keys", "_shape", "_start")

    def __init__(
        self,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        keys: Encoded,
        values: Encoded,
        layout: Layout,
        inputs: DeviceInputs | None,
        moved: tuple[int, int] = (0, 0),
    ) -> None:
        inputs = inputs or device_inputs(layout.end, None, new_keys.device)
        _refuse_ragged(inputs)
        key_data, dtype = keys.planes[0], new_keys.dtype
        batch, key_heads, count, key_width = new_keys.shape
        for new, encoded in ((new_keys, keys), (new_values, values)):
            data = encoded.planes[0]
            rows = len(data) if inputs.columns else batch
            is_alike = data.shape[:3] == (rows, new.shape[1], key_data.shape[2]) and len(data) == len(key_data)
            is_alike = is_alike and new.shape == (batch, new.shape[1], count, encoded.head_dim)
            if not is_alike or (encoded.codec.is_lossless and data.dtype != dtype):
                raise ValueError(f"new tokens {tuple(new.shape)} do not go into planes of {tuple(data.shape)}")
        self._alike, self._num_keys = (new_keys.stride(), new_values.stride(), key_data.shape), len(keys.planes)
        self._shape = array(
            "q",
            (
                *(batch, inputs.batch, inputs.columns, count, DTYPES[dtype], key_data.shape[2], len(key_data)),
                *(num_threads(), code_of(keys.codec.name, dtype) or 0, key_heads, key_width, *new_keys.stride()[:3]),
                *(code_of(values.codec.name, dtype) or 0, new_values.shape[1], new_values.shape[3]),
                *new_values.stride()[:3],
                *moved,
            ),
        )
        self._start = self._shape.buffer_info()[0], inputs.meta.data_ptr()
        self._inputs = inputs  # what is pointed to stays

    def takes(self, new_keys: torch.Tensor, new_values: torch.Tensor, planes: Sequence[torch.Tensor]) -> bool:
        """Whether tokens of the first ones' shape, and planes of the same codecs, lie in memory as the first ones."""
        return (new_keys.stride(), new_values.stride(), planes[0].shape) == self._alike

    def run(self, new_keys: torch.Tensor, new_values: torch.Tensor, planes: Sequence[torch.Tensor]) -> None:
        """Encodes and writes tokens that it takes.

        Raises:
            ValueError: the planes have no room for them.
        """
        is_full = loaded().hfkv_append(
            *self._start, new_keys.data_ptr(), new_values.data_ptr(), *_pointers(planes, self._num_keys)
        )  # fmt: skip
        if is_full:
            raise ValueError(f"{new_keys.shape[2]} new tokens find no room in planes of {tuple(planes[0].shape)}")


def _refuse_ragged(inputs: DeviceInputs) -> None:
    """Refuses rows of different lengths, which only the kernels of a GPU tell apart."""
    if inputs.is_ragged:
        raise ValueError("native kernels take one length for all rows: give each row a call of its own")


def _check(name: str, given: torch.Tensor, sizes: tuple[int, ...], is_long_enough: bool = True) -> None:
    """Refuses a mask or bounds that are neither one nor all in their dimensions but the last of `sizes`."""
    *free, num_queries = sizes
    fits = all(size in (1, most) for size, most in zip(given.shape, free, strict=False))
    if not fits or given.shape[len(free)] != num_queries or not is_long_enough:
        raise ValueError(f"{name} {tuple(given.shape)} are not for queries of {sizes}")


def _pointers(planes: Sequence[torch.Tensor], num_keys: int) -> list[int]:
    """Where the data and the scales of keys, the first `num_keys`, and of values lie.

    Raises:
        ValueError: a plane does not lie in one piece.
    """
    for plane in planes:
        if not plane.is_contiguous():
            raise ValueError(f"native kernels take contiguous planes, got strides {plane.stride()}")
    pointers = [plane.data_ptr() for plane in planes]
    if num_keys == 1:
        pointers.insert(1, 0)
    return pointers if len(pointers) == 4 else [*pointers, 0]
