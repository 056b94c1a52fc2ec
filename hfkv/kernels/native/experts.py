"""Products with experts' matrices as they are stored, in C++; see `hfkv.kernels.experts.codes` for how they are."""

from __future__ import annotations

from array import array

import torch

from hfkv.kernels.experts.codes import GROUP
from hfkv.kernels.native.kernels import DTYPES
from hfkv.kernels.native.library import library, loaded, num_threads

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 4}


def serves(x: torch.Tensor) -> bool:
    """Whether there are such kernels for rows `x` here; a trace does not see them."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not torch.jit.is_tracing() and library() is not None


def expert_products(
    x: torch.Tensor,
    out: torch.Tensor,
    expert: int,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    units: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> None:
    """Computes ``x @ W.T`` for some outputs of an expert, into their columns of `out`.

    Sums are float32. More than a few bfloat16 rows meet numbers rounded to bfloat16, where the processor has products
    of such.

    Args:
        x: fp32, bf16 or fp16 `[n, K]`.
        out: `[n, outputs]` of the dtype of `x`, contiguous.
        expert: which of the matrices.
        weight: fp32 or bf16 `[E, N, K]`, int8 `[E, N, K]`, or int4 in uint8 `[E, N, Kp / 2]`; rows lie in one piece.
        scale: of int8: float32 `[E, N]`.
        groups: of int4: int8 `[E, Kp / 32, N, 2]`.
        units: of int4: bfloat16 `[E, N, 2]`.
        columns: int16 or int32 `[E, N]`; None: output n is column n.

    Raises:
        ValueError: tensors that do not belong together.
        MemoryError: there is no memory for what is summed.
    """
    shape, pointers = _matrix(x.shape[1], out.shape[1], expert, weight, scale, groups, units, columns)
    if len(x) != len(out) or x.dtype != out.dtype or x.dtype not in DTYPES or not out.is_contiguous():
        raise ValueError(f"x {list(x.shape)} of {x.dtype} does not go into {list(out.shape)} of {out.dtype}")
    x = x.contiguous()
    given = array("q", (*shape, len(x), DTYPES[x.dtype], out.shape[1], num_threads()))
    _check(loaded().hfkv_expert_linear(given.buffer_info()[0], *pointers, x.data_ptr(), out.data_ptr()))


def expert_numbers(
    out: torch.Tensor,
    expert: int,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    units: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> None:
    """Decodes some outputs of an expert to their rows of `out`, fp32 or bf16 `[outputs, K]`, contiguous.

    The other arguments, and what is raised, are those of `expert_products`.
    """
    shape, pointers = _matrix(out.shape[1], len(out), expert, weight, scale, groups, units, columns)
    if out.dtype not in (torch.float32, torch.bfloat16) or not out.is_contiguous():
        raise ValueError(f"numbers are decoded to contiguous fp32 or bf16, not {out.dtype} of strides {out.stride()}")
    given = array("q", (*shape, DTYPES[out.dtype], num_threads()))
    _check(loaded().hfkv_expert_numbers(given.buffer_info()[0], *pointers, out.data_ptr()))


def _matrix(
    inputs: int, most: int, expert: int, weight: torch.Tensor, *planes: torch.Tensor | None
) -> tuple[tuple[int, ...], list[int]]:
    """What the native code is told of a matrix, and where its planes lie."""
    scale, groups, units, columns = planes
    experts, outputs, width = weight.shape
    code, padded = _CODES.get(weight.dtype), -(-inputs // GROUP) * GROUP
    fits = code is not None and 0 <= expert < experts and weight.stride(2) == 1 and outputs <= most
    fits = fits and width == (padded // 2 if code == 4 else inputs) and (columns is not None or outputs == most)
    fits = fits and (scale is None) == (code != 2) and (groups is None) == (units is None) == (code != 4)
    if not fits:
        raise ValueError(
            f"expert {expert} of {weight.dtype} {list(weight.shape)} is no matrix of {inputs} inputs and {most} outputs"
        )
    wanted = ((experts, outputs), (experts, padded // GROUP, outputs, 2), (experts, outputs, 2), (experts, outputs))
    pointers = [weight.data_ptr() + expert * weight.stride(0) * weight.itemsize]
    for plane, sizes in zip(planes, wanted, strict=True):
        if plane is not None and (plane.shape != sizes or not plane.is_contiguous()):
            raise ValueError(f"a plane {list(plane.shape)}, where a contiguous {list(sizes)} belongs")
        pointers.append(0 if plane is None else plane.data_ptr() + expert * plane.stride(0) * plane.itemsize)
    column_bytes = 0 if columns is None else columns.itemsize
    return (code or 0, outputs, inputs, weight.stride(1) * weight.itemsize, column_bytes), pointers


def _check(failure: int) -> None:
    if failure:
        raise MemoryError("no memory for the products of an expert")
