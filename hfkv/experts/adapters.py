"""`Factors`: what LoRA adds to the matrices of a layer's experts, as two thin matrices for each expert."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False)
class Factors:
    """``W + scaling · B A`` for E experts, never multiplied out.

    Attributes:
        a: `[E, r, K]`.
        b: `[E, N, r]`.
        scaling: LoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def add_to(self, y: torch.Tensor, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Adds to `y` `[n, N]` what one expert's factors make of `x` `[n, K]`; `y` may be overwritten."""
        # In the dtype of the factors, float32 by default: converting x costs less, and products of thin bfloat16
        # matrices take a CPU five times as long (38 against 7 us for r 8 and N 4096).
        added = F.linear(x.to(self.a.dtype), self.a[expert]) @ self.b[expert].t()
        if torch.is_grad_enabled():
            return torch.add(y, added, alpha=self.scaling).to(y.dtype)
        return y.add_(added, alpha=self.scaling)

    def ready(self, dtype: torch.dtype) -> Factors:
        """These factors for a forward in `dtype`: without gradients, an expert's numbers of `b` side by side."""
        if torch.is_grad_enabled() and (self.a.requires_grad or self.b.requires_grad):
            return self
        dtype = torch.float32 if self.a.device.type == "cpu" else dtype
        a = self.a if self.a.dtype == dtype else _side_by_side(self.a.transpose(1, 2), dtype).transpose(1, 2)
        return Factors(a, _side_by_side(self.b, dtype), self.scaling)

    @classmethod
    def of_product(cls, left: torch.Tensor, right: torch.Tensor, scaling: float, is_transposed: bool) -> Factors:
        """The factors of a change of the parameter itself, ``left @ right``, in the model's layout."""
        if is_transposed:
            return cls(left.transpose(1, 2), right.transpose(1, 2), scaling)
        return cls(right, left, scaling)


# An experts module of a patched model has this attribute: what is called when adapters are found to be multiplied out,
# so that they are not the next time.
ADOPT = "_hfkv_adopt"

# PEFT's matrix `[N, r E]` has an expert's numbers far apart: reading those of one expert reads nearly all. This is the
# last copy of each with them side by side.
_copies = WeakTensorKeyDictionary()


class _Copy(NamedTuple):
    """A copy of a factor, and what it was made of."""

    made_of: tuple[int, int, torch.dtype]
    sample: torch.Tensor
    numbers: torch.Tensor


def _side_by_side(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A factor in `dtype`, its columns contiguous: the same copy again until the factor is written to."""
    owner = factor if factor._base is None else factor._base
    version = -1 if owner.is_inference() else owner._version
    made_of = (factor.data_ptr(), version, dtype)
    # Torch counts no writes through `.data`: some of the numbers tell, two of each expert and rank among them.
    outputs = factor.shape[1]
    sample = factor.detach()[:, outputs // 3 :: max(outputs // 3, 1)]
    copy: _Copy | None = _copies.get(owner)
    if copy is None or copy.made_of != made_of or not torch.equal(copy.sample, sample):
        with torch.inference_mode(False), torch.no_grad():  # a later forward may need it for its gradients
            copy = _copies[owner] = _Copy(made_of, sample.clone(), _by_columns(factor.detach().to(dtype)))
    return copy.numbers


def _by_columns(factor: torch.Tensor) -> torch.Tensor:
    return factor.transpose(1, 2).contiguous().transpose(1, 2)


class _Applied(threading.local):
    """The factors being added in this thread's forwards, by module and parameter."""

    def __init__(self) -> None:
        self.factors: dict[tuple[int, str], tuple[Factors, ...]] = {}


_applied = _Applied()


@contextmanager
def applied(experts: Any, name: str, factors: tuple[Factors, ...]) -> Iterator[None]:
    """Makes the ``hfkv`` experts add `factors` to the parameter `name` of `experts`, while the context lasts."""
    key = (id(experts), name)
    before = _applied.factors.get(key, ())
    _applied.factors[key] = before + factors
    try:
        yield
    finally:
        if before:
            _applied.factors[key] = before
        else:
            del _applied.factors[key]


def factors_of(experts: Any, name: str) -> tuple[Factors, ...]:
    """The factors being added to a parameter in this thread."""
    return _applied.factors.get((id(experts), name), ())
