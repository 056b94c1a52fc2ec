"""`Int8Weights`: experts as int8 numbers with one scale for each output."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hfkv.experts.weights import ExpertWeights, aligned, check_matrix
from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.crossover import can_decode, is_native
from hfkv.kernels.native.experts import expert_numbers, expert_products

# `torch._weight_int8pack_mm` reads past the end of a matrix whose rows are no multiple of this many numbers, and
# crashes on one that does not begin at a multiple of so many bytes (what is loaded from a file need not).
_CPU_INPUTS, _CPU_OUTPUTS, _CPU_BYTES = 32, 4, 16
# Rows up to which it is faster than decoding by torch, in bfloat16 and in other dtypes. 4096 x 1024, 1 core of an EPYC:
# 1.7 ms of 32 rows, 3.4 of 64; in float32 2.8 ms a row.
_CPU_ROWS, _CPU_FEW = 32, 3


class Int8Weights(ExpertWeights):
    """``W ≈ codes · scales``: int8 `[E, N, K]` and float32 `[E, N]`, every scale a bfloat16 number.

    The error of a matrix product is 0.75 % of its size where weights are Gaussian.
    """

    form = "int8"
    is_lossy = True

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        self.int8 = torch.zeros(shape, dtype=torch.int8, device=device)
        self.scales = torch.ones(shape[:2], dtype=torch.float32, device=device)

    @property
    def device(self) -> torch.device:
        return self.int8.device

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.decode(expert).to(x.dtype))
        if is_native("int8", x):
            out = x.new_empty(len(x), self.shape[1])
            expert_products(x, out, expert, self.int8, self.scales)
            return out
        # Torch's own product is for few rows, in other dtypes than bfloat16 very few: decoded experts are then faster.
        if len(x) <= (_CPU_ROWS if x.dtype == torch.bfloat16 else _CPU_FEW) and self._is_tiled(expert):
            return torch._weight_int8pack_mm(x, self.int8[expert], self.scales[expert].to(x.dtype))
        return F.linear(x, self._numbers(expert, x.dtype))

    def _is_tiled(self, expert: int) -> bool:
        _, outputs, inputs = self.shape
        is_aligned = self.int8[expert].data_ptr() % _CPU_BYTES == 0
        return inputs % _CPU_INPUTS == 0 and outputs % _CPU_OUTPUTS == 0 and is_aligned

    def _numbers(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """An expert's matrix for a product on a CPU."""
        if not can_decode(dtype):
            return self.decode(expert).to(dtype)
        numbers = torch.empty(self.shape[1:], dtype=dtype)
        expert_numbers(numbers, expert, self.int8, self.scales)
        return numbers

    def decode(self, expert: int) -> torch.Tensor:
        return (self.int8[expert] * self.scales[expert, :, None]).to(self.dtype)

    def write(self, expert: int, matrix: torch.Tensor) -> None:
        check_matrix(self, matrix)
        matrix = matrix.detach().to(self.device, torch.float32)
        largest = matrix.abs().amax(dim=1) if matrix.shape[1] else matrix.new_zeros(matrix.shape[0])
        # Rounded before anything is divided by it, so that its rounding costs no accuracy.
        scales = (largest / 127).bfloat16().float()
        scales = torch.where(scales == 0, 1.0, scales)
        self.int8[expert] = (matrix / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.scales[expert] = scales

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        moved = object.__new__(Int8Weights)
        moved.shape, moved.dtype = self.shape, dtype
        moved.int8, moved.scales = self.int8.to(device, copy=True), self.scales.to(device, copy=True)
        return moved

    def codes(self) -> tuple[Codes, ...]:
        return (Codes(self.int8, self.scales, None, None, None, self.shape[2]),)

    @classmethod
    def of_planes(cls, planes: dict[str, torch.Tensor], dtype: torch.dtype) -> Int8Weights:
        """The weights written from `portable_planes`."""
        weights = object.__new__(cls)
        weights.int8, weights.scales = aligned(planes["int8"]), planes["scales"].float()
        weights.shape, weights.dtype = tuple(weights.int8.shape), dtype  # type: ignore[assignment]
        return weights

    def portable_planes(self) -> dict[str, torch.Tensor]:
        """The `planes` in an order that no processor decides."""
        return self.planes()

    def planes(self) -> dict[str, torch.Tensor]:
        return {"int8": self.int8, "scales": self.scales}
