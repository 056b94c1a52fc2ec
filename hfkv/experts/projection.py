"""`Projection`: one of the two matrix products of an expert, with everything that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfkv.experts.adapters import ADOPT, Factors, factors_of
from hfkv.experts.stack import ExpertStack
from hfkv.experts.weights import ExpertWeights, PlainWeights


@dataclass(frozen=True, eq=False)
class Projection:
    """``x @ (W + B A).T + bias`` for any expert of a layer.

    Attributes:
        weights: the matrices.
        bias: `[E, N]`, or None.
        factors: the factors of the adapters in use.
        is_trained: whether the matrices themselves are to get gradients.
        is_stack: whether the matrices stand for a parameter, and are none.
    """

    weights: ExpertWeights
    bias: torch.Tensor | None
    factors: tuple[Factors, ...]
    is_trained: bool
    is_stack: bool = False

    def __call__(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Computes `[n, N]` for `x` `[n, K]`, contiguous."""
        weights = self.weights
        if not self.is_stack or not torch.is_grad_enabled():
            y = weights.linear(x, expert)
        else:
            y = _Frozen.apply(x, weights, expert, _tracked() if self.is_trained else None)
        for factors in self.factors:
            y = factors.add_to(y, x, expert)
        return y if self.bias is None else y + self.bias[expert]


def projection_of(experts: Any, name: str) -> Projection:
    """Makes the projection of a module that transformers' experts interface knows.

    Args:
        experts: the module.
        name: ``"gate_up_proj"``, ``"up_proj"`` or ``"down_proj"``.
    """
    given, factors = _parameter(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    is_trained = given.requires_grad and torch.is_grad_enabled()
    factors = tuple(each.ready(given.dtype) for each in factors)
    if isinstance(given, ExpertStack):
        return Projection(given.weights, bias, factors, is_trained, is_stack=True)
    plain = PlainWeights(given.transpose(1, 2) if experts.is_transposed else given)
    return Projection(plain, bias, factors, is_trained)


def _parameter(experts: Any, name: str) -> tuple[torch.Tensor, tuple[Factors, ...]]:
    """A parameter without the adapters whose factors are known, and these factors."""
    factors = factors_of(experts, name)
    # Reading a parametrised parameter multiplies the adapter of every expert out.
    parametrised = experts.parametrizations[name] if name in experts._modules.get("parametrizations", ()) else None
    if parametrised is None:
        return getattr(experts, name), factors
    if not all(hasattr(part, "lhs") and hasattr(part, "rhs") for part in parametrised):
        return getattr(experts, name), factors
    if ADOPT in vars(experts):
        vars(experts)[ADOPT]()
    of_peft = (Factors.of_product(p.lhs, p.rhs, p.scaling, experts.is_transposed) for p in parametrised)
    return parametrised.original, (*factors, *of_peft)


def _tracked() -> torch.Tensor:
    return torch.zeros((), requires_grad=True)


class _Frozen(torch.autograd.Function):
    """Lets gradients through to the inputs; the matrices get none, and where they should, it raises."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: ExpertWeights, expert: int, tracked: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weights, ctx.expert, ctx.is_trained = weights, expert, tracked is not None
        return weights.linear(x, expert)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if ctx.is_trained:
            raise RuntimeError(
                f"the experts are {ctx.weights.form}, for inference, and get no gradients; train before "
                "hfkv.patch(model, moe=...), or after hfkv.unpatch(model), or freeze them (as LoRA does): "
                "experts.requires_grad_(False)"
            )
        (grad,) = grads
        return grad @ ctx.weights.decode(ctx.expert).to(grad.dtype), None, None, None
