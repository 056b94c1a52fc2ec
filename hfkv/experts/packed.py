"""`PackedWeights`: experts in oneDNN's own order, which a CPU reads faster; the same numbers, the same bytes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hfkv.experts.weights import ExpertWeights, PlainWeights, check_matrix
from hfkv.kernels.cpu.packed_matmul import pack, packed_linear
from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.crossover import SWITCH, crossover

# Numbers of each expert that stand for all of them where it is asked whether weights changed.
_SAMPLES = 8


def why_plain(matrices: torch.Tensor) -> str | None:
    """Says why a stack `[E, N, K]` stays plain: it cannot be packed, or is slower then; None where it is faster."""
    reason = unpackable(matrices)
    if reason is None and not crossover(matrices.dtype).packs:
        reason = f"measured: on this processor oneDNN's order is slower at some lengths ({SWITCH}=0 packs them anyway)"
    return reason


def unpackable(matrices: torch.Tensor) -> str | None:
    """Says why a stack `[E, N, K]` cannot be packed; None where it can."""
    if matrices.device.type != "cpu":
        return f"on {matrices.device.type}"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this torch has no oneDNN"
    if matrices.dtype == torch.float32:
        return None
    if matrices.dtype == torch.bfloat16:
        return None if _packs_bfloat16() else "this processor's oneDNN takes no bfloat16"
    return f"oneDNN packs bfloat16 and float32, not {str(matrices.dtype).removeprefix('torch.')}"


@functools.cache
def _packs_bfloat16() -> bool:
    """Whether oneDNN packs bfloat16: torch asks the processor, and not what oneDNN has been limited to."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        pack(torch.zeros(16, 16, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


class PackedWeights(ExpertWeights):
    """One opaque oneDNN tensor for each expert; decoding is exact.

    Measured on 2 cores of an AMD EPYC (AVX-512, bf16; H 1024, I 2048, E 16, K 2), against plain matrices in the same
    loop: 1.5 x at one token, 1.6 x at 8 and 1.5 x at 128 tokens.
    """

    form = "packed"

    def __init__(self, matrices: torch.Tensor) -> None:
        self.shape = tuple(matrices.shape)  # type: ignore[assignment]
        self.dtype = matrices.dtype
        self._packed = [pack(matrix) for matrix in matrices]
        # An opaque tensor has no storage to look at: a few numbers tell whether weights are others.
        self.sample = torch.stack([_few(matrix) for matrix in matrices])

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return packed_linear(x, self._packed[expert])

    def decode(self, expert: int) -> torch.Tensor:
        return self._packed[expert].to_dense()

    def write(self, expert: int, matrix: torch.Tensor) -> None:
        check_matrix(self, matrix)
        self._packed[expert] = pack(matrix.to(self.dtype))
        self.sample[expert] = _few(matrix)

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        whole = self.read_all().to(device, dtype)
        return PlainWeights(whole) if why_plain(whole) else PackedWeights(whole)

    def codes(self) -> tuple[Codes, ...]:
        raise RuntimeError("packed experts are for a CPU; kernels of accelerators read plain ones")

    def planes(self) -> dict[str, torch.Tensor]:
        return {"sample": self.sample}

    def nbytes(self) -> int:
        """The bytes of the numbers; oneDNN may add a few to round a matrix up to whole blocks."""
        experts, outputs, inputs = self.shape
        return experts * outputs * inputs * self.dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {"matrices": self.read_all()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["matrices"])  # type: ignore[misc]


def _few(matrix: torch.Tensor) -> torch.Tensor:
    outputs, inputs = matrix.shape
    places = torch.arange(_SAMPLES)
    return matrix.detach()[places * 7919 % outputs, places * 104729 % inputs]
