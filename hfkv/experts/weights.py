"""`ExpertWeights`: one matrix for each expert of a layer, in whatever form it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hfkv.kernels.experts.codes import Codes
from hfkv.kernels.experts.crossover import is_native
from hfkv.kernels.native.experts import expert_products

_ALIGNMENT = 64


class ExpertWeights(ABC):
    """E matrices ``[N outputs, K inputs]``.

    Attributes:
        form: ``"plain"``, ``"packed"``, ``"int8"`` or ``"int4"``.
        shape: (E, N, K).
        dtype: the dtype of the numbers they stand for.
        is_lossy: whether writing rounds.
    """

    form: str
    is_lossy = False
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which they are read."""

    @abstractmethod
    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Computes ``x @ W.T`` for one expert.

        Args:
            x: `[n, K]` of `dtype`, n at least 1, contiguous.
            expert: the expert's index.

        Returns:
            `[n, N]`, of `dtype`.
        """

    def expect(self, experts: list[int]) -> list[int]:
        """Announces a forward that uses `experts`; returns them in the order that is best."""
        return experts

    @abstractmethod
    def decode(self, expert: int) -> torch.Tensor:
        """Decodes one expert's matrix `[N, K]` in `dtype`; it may share the weights' memory: not to be written to."""

    @abstractmethod
    def write(self, expert: int, matrix: torch.Tensor) -> None:
        """Replaces one expert's matrix by `matrix` `[N, K]`."""

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        """Copies the numbers to another device or dtype; always a copy."""

    @abstractmethod
    def codes(self) -> tuple[Codes, ...]:
        """The codes that a kernel on an accelerator reads."""

    @abstractmethod
    def planes(self) -> dict[str, torch.Tensor]:
        """The bytes that matter, by name: what is saved, and what says whether they changed."""

    def nbytes(self) -> int:
        """The bytes held."""
        return sum(plane.nbytes for plane in self.planes().values())

    def can_take(self, other: ExpertWeights) -> bool:
        """Whether `take` may be called with weights of the same class."""
        return self.is_lossy and self.shape == other.shape

    def take(self, other: ExpertWeights) -> None:
        """Makes these weights a copy of `other`, as it is kept."""
        vars(self).update(vars(other.to(self.device, self.dtype)))

    def read_all(self) -> torch.Tensor:
        """Reads all matrices `[E, N, K]` in `dtype`, a fresh tensor."""
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for expert in range(self.shape[0]):
            whole[expert] = self.decode(expert)
        return whole

    def write_all(self, matrices: torch.Tensor) -> None:
        """Replaces all matrices by `matrices` `[E, N, K]`."""
        for expert, matrix in enumerate(matrices):
            self.write(expert, matrix)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"


class PlainWeights(ExpertWeights):
    """A tensor `[E, N, K]`, of any strides, as it is."""

    form = "plain"

    def __init__(self, matrices: torch.Tensor) -> None:
        self.matrices = matrices
        self.shape = tuple(matrices.shape)  # type: ignore[assignment]
        self.dtype = matrices.dtype
        self._each: Sequence[torch.Tensor] = matrices  # type: ignore[assignment]

    def unbound(self) -> PlainWeights:
        """The same weights, each matrix cut out of the tensor once: its gradient is then smaller than all of them."""
        weights = PlainWeights(self.matrices)
        weights._each = self.matrices.unbind(0)
        return weights

    @property
    def device(self) -> torch.device:
        return self.matrices.device

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        if self._is_native(x):
            out = x.new_empty(len(x), self.shape[1])
            expert_products(x, out, expert, self.matrices)
            return out
        return F.linear(x, self._each[expert])

    def _is_native(self, x: torch.Tensor) -> bool:
        """Whether the native kernels are the fastest; gradients, and rows in modules' own layout, are torch's."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or self.matrices.stride(2) != 1 or x.dtype != self.dtype:
            return False
        return is_native("plain", x)

    def decode(self, expert: int) -> torch.Tensor:
        return self.matrices[expert]

    def write(self, expert: int, matrix: torch.Tensor) -> None:
        self.matrices[expert] = matrix

    def to(self, device: torch.device, dtype: torch.dtype) -> ExpertWeights:
        return PlainWeights(self.matrices.to(device, dtype, copy=True))

    def codes(self) -> tuple[Codes, ...]:
        return (Codes(self.matrices, None, None, None, None, self.shape[2]),)

    def planes(self) -> dict[str, torch.Tensor]:
        return {"matrices": self.matrices}


def check_matrix(weights: ExpertWeights, matrix: torch.Tensor) -> None:
    """Raises ValueError where `matrix` is not one of an expert of `weights`."""
    if tuple(matrix.shape) != weights.shape[1:]:
        raise ValueError(f"an expert here is a matrix of {list(weights.shape[1:])}, got {list(matrix.shape)}")


def aligned(plane: torch.Tensor) -> torch.Tensor:
    """A tensor that begins where vectors may: itself, or a copy."""
    return plane.clone() if plane.device.type == "cpu" and plane.data_ptr() % _ALIGNMENT else plane
