"""`ExpertSource`: all experts of one projection as they lie in host memory or in a file, to be copied one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hfkv.experts.int4 import TORCH, Int4Weights
from hfkv.experts.int8 import Int8Weights
from hfkv.experts.packed import PackedWeights, why_plain
from hfkv.experts.weights import ExpertWeights, PlainWeights

Planes = Mapping[str, torch.Tensor]
# Numbers that are looked at of each expert, to tell weights apart: half from the middle of each of two rows.
_SAMPLES = 256


@dataclass(frozen=True, eq=False)
class ExpertSource:
    """E matrices, written in a codec.

    Attributes:
        codec: ``"none"``, ``"int8"`` or ``"int4"``.
        shape: (E, N, K).
        dtype: the dtype of the numbers they stand for, where they are read.
        planes: the planes of `PlainWeights`, `Int8Weights` or `Int4Weights`, on the CPU, each `[E, ...]`.
        is_transposed: for codec none, whether the matrices lie as `[E, K, N]`.
        has_cpu_order: for int4, whether nibbles are in the order of this processor's products.
        path: the file they are mapped from; None for host memory of their own.
        is_pinned: whether a device can read them by itself.
        digest: uint8, for mapped experts: tells them from others without reading them.
        verify: called before an expert is read; raises ValueError where the file is damaged.
        reopen: for mapped experts, gives the same in another process.
    """

    codec: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    planes: Planes
    is_transposed: bool = False
    has_cpu_order: bool = False
    path: str | None = None
    is_pinned: bool = False
    digest: torch.Tensor | None = None
    verify: Callable[[int], None] | None = None
    reopen: Callable[[], ExpertSource] | None = None

    @property
    def expert_bytes(self) -> int:
        """The bytes of one expert, as it travels."""
        return sum(plane[0].nbytes for plane in self.planes.values())

    def __reduce__(self) -> Any:
        if self.reopen is not None:
            return _reopen, (self.reopen, self.dtype)
        fields = (self.codec, self.shape, self.dtype, dict(self.planes), self.is_transposed, self.has_cpu_order)
        return ExpertSource, fields

    def expert(self, expert: int) -> dict[str, torch.Tensor]:
        """The planes of one expert.

        Raises:
            ValueError: the file is damaged.
        """
        if self.verify is not None:
            self.verify(expert)
        return {name: plane[expert] for name, plane in self.planes.items()}

    def portable(self, expert: int) -> dict[str, torch.Tensor]:
        """The planes of one expert as any machine reads them, matrices as `[N, K]`."""
        planes = self.expert(expert)
        if self.has_cpu_order:
            planes = _portable(self.one(expert, torch.device("cpu")))
        if self.is_transposed:
            planes["matrices"] = planes["matrices"].t().contiguous()
        return planes

    def one(self, expert: int, device: torch.device) -> ExpertWeights:
        """A single expert as weights of its own, on `device`."""
        weights = blank(self.codec, (1, *self.shape[1:]), self.dtype, device, is_packed=False)
        fill(weights, 0, self, expert)
        return weights

    def resident(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        """All experts on `device`, in the form that is read fastest there."""
        weights = blank(self.codec, self.shape, dtype, device)
        for expert in range(self.shape[0]):
            fill(weights, expert, self, expert)
        return weights


def blank(
    codec: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_packed: bool = True,
    is_transposed: bool = False,
) -> ExpertWeights:
    """Weights of zeros, to be written to.

    Args:
        codec, shape, dtype, device: the weights' own.
        is_packed: whether a CPU may have plain weights in oneDNN's order.
        is_transposed: whether plain weights are to lie as `[E, K, N]`.

    Raises:
        MemoryError: there is no memory for them.
    """
    experts, outputs, inputs = shape
    try:
        if codec == "int8":
            return Int8Weights(shape, dtype, device)
        if codec == "int4":
            return Int4Weights(shape, dtype, device, order=TORCH)
        zeros = torch.zeros(1, outputs, inputs, dtype=dtype, device=device)
        if is_packed and why_plain(zeros) is None:
            return PackedWeights(zeros.expand(shape))
        if is_transposed:
            return PlainWeights(zeros.new_zeros(experts, inputs, outputs).transpose(1, 2))
        return PlainWeights(zeros.new_zeros(shape))
    except RuntimeError as error:
        num_bytes = experts * expert_bytes(codec, shape, dtype)
        raise MemoryError(
            f"could not allocate {num_bytes:,} bytes for {experts} experts on {device} ({str(error).splitlines()[0]}); "
            "use a smaller codec or a smaller device_budget"
        ) from error


def fill(weights: ExpertWeights, slot: int, source: ExpertSource, expert: int) -> None:
    """Replaces an expert of `weights`, on any device, by an expert of a source, and waits for it."""
    planes = source.expert(expert)
    if source.codec == "none":
        matrix = planes["matrices"]
        weights.write(slot, matrix.t() if source.is_transposed else matrix)
        return
    if source.codec == "int4" and source.has_cpu_order != (weights.device.type == "cpu"):
        planes = source.portable(expert) if source.has_cpu_order else _in_cpu_order(planes, source.dtype)
    for name, plane in weights.planes().items():
        plane[slot].copy_(planes[name])


def plane_shapes(
    codec: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of each plane of a source."""
    if codec == "none":
        return {"matrices": (shape, dtype)}
    planes = blank(codec, shape, dtype, torch.device("meta")).planes()
    return {name: (tuple(plane.shape), plane.dtype) for name, plane in planes.items()}


def expert_bytes(codec: str, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """The bytes of one expert of such a source."""
    shapes = plane_shapes(codec, (1, *shape[1:]), dtype).values()
    return sum(torch.Size(plane).numel() * dtype.itemsize for plane, dtype in shapes)


class Encoder:
    """Writes one matrix after the other in a codec.

    Args:
        codec, shape, dtype: the source's own, for which the planes are.
        device: the device that computes the planes.
        has_cpu_order: see `ExpertSource`.
    """

    def __init__(
        self, codec: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, has_cpu_order: bool
    ) -> None:
        self.dtype = dtype
        self.turns = codec == "int4" and device.type == "cpu" and not has_cpu_order
        self.scratch = None if codec == "none" else blank(codec, (1, *shape[1:]), dtype, device)

    def __call__(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The planes of `matrix` `[N, K]`, contiguous, on the CPU."""
        matrix = matrix.detach()
        if self.scratch is None:
            return {"matrices": matrix.to("cpu", self.dtype).contiguous()}
        self.scratch.write(0, matrix)
        if self.turns:
            return _portable(self.scratch)
        return {name: plane[0].cpu() for name, plane in self.scratch.planes().items()}


def _reopen(reopen: Callable[[], ExpertSource], dtype: torch.dtype) -> ExpertSource:
    return replace(reopen(), dtype=dtype)


def _portable(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """The planes of a single expert of int4 on a CPU."""
    assert isinstance(weights, Int4Weights)
    return {name: plane[0] for name, plane in weights.portable_planes().items()}


def _in_cpu_order(planes: Planes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The reverse of `_portable`."""
    copies = {name: plane[None].clone() for name, plane in planes.items()}
    return {name: plane[0] for name, plane in Int4Weights.of_planes(copies, dtype, order=TORCH).planes().items()}


def contents_digest(matrices: Iterable[torch.Tensor]) -> str:
    """A digest of every number of all matrices `[N, K]`, on any device: a gigabyte takes about a second."""
    digest = hashlib.blake2b(digest_size=16)
    for matrix in matrices:
        digest.update(repr((tuple(matrix.shape), matrix.dtype)).encode())
        digest.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
