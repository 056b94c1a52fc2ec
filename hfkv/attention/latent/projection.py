"""`LatentProjection`: the matrix that expands latents into keys and values, taken apart so that it can be absorbed."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from hfkv.models.latents import Widths
from hfkv.models.weights_at_rest import hooks_of

# Linear layers that give what their weights say for every row alike, however those are written.
_QUANTIZED = (
    ("bitsandbytes.nn", "Linear4bit"),
    ("bitsandbytes.nn", "Linear8bitLt"),
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
)
# Hooks of accelerate's that bring weights and inputs to where they are computed with.
_MOVERS = {("accelerate.hooks", name) for name in ("AlignDevicesHook", "CpuOffload")}


class LatentFactors(NamedTuple):
    """What LoRA adds to the matrix: ``scaling · B A``, never multiplied out.

    Attributes:
        a: `[k, r]`.
        b: `[H, dn + dv, k]`.
        scaling: LoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class LatentProjection:
    """``kv_b_proj`` as it is in this forward: views of its weight, nothing that could go stale.

    Args:
        linear: the layer itself.
        widths: the widths of what it maps.
        base: the layer inside, where adapters are around it.
        weight: `[H · (dn + dv), r]`, or None where the base layer has to be asked for it.
        factors: the factors of the active adapters.
    """

    def __init__(
        self, linear: Any, widths: Widths, base: Any, weight: torch.Tensor | None, factors: tuple[LatentFactors, ...]
    ) -> None:
        self.linear, self.widths, self.factors = linear, widths, factors
        self._base, self._weight = base, weight

    @property
    def is_decoded(self) -> bool:
        """Whether the weight is decoded or brought when it is asked for, which costs as much as expanding r tokens."""
        return self._weight is None

    def weight(self, like: torch.Tensor) -> torch.Tensor:
        """The weight `[H, dn + dv, r]`, in the dtype and on the device of `like`."""
        weight = self._weight
        if weight is None:
            weight = self._base(torch.eye(self.widths.latent, dtype=like.dtype, device=like.device)).t()
            self._weight = weight
        return of_heads(weight, self.widths)

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Turns queries `[B, H, q, dn + dr]` into queries of latents `[B, H, q, r + dr]`: folds the keys' half in."""
        nope, rotary = query.split((self.widths.nope, self.widths.rotary), dim=-1)
        absorbed = by_head(nope, self.weight(query)[:, : self.widths.nope])
        for a, b, scaling in self.factors:
            added = by_head(nope.to(b.dtype), b[:, : self.widths.nope]) @ a
            absorbed = (absorbed + added * scaling).to(query.dtype)
        return torch.cat((absorbed, rotary), dim=-1)

    def release(self, attended: torch.Tensor) -> torch.Tensor:
        """Turns sums of latents `[B, H, q, r]` into sums of values `[B, H, q, dv]`: folds the values' half in."""
        released = by_head(attended, self.weight(attended)[:, self.widths.nope :], is_turned=True)
        for a, b, scaling in self.factors:
            thin = attended.to(a.dtype) @ a.t()
            added = by_head(thin, b[:, self.widths.nope :], is_turned=True)
            released = (released + added * scaling).to(attended.dtype)
        return released

    def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expands latents `[B, 1, n, r]`: keys without rotary part `[B, H, n, dn]`, values `[B, H, n, dv]`."""
        nope, value = self.widths.nope, self.widths.value
        # Of three dimensions: bitsandbytes' 8-bit product takes no more.
        expanded = self.linear(latents[:, 0]).unflatten(2, (-1, nope + value)).transpose(1, 2)
        return expanded.split((nope, value), dim=-1)


def by_head(states: torch.Tensor, matrices: torch.Tensor, is_turned: bool = False) -> torch.Tensor:
    """Multiplies states by one matrix for each head; no matrix is copied for the rows of a batch.

    Args:
        states: `[B, H, q, i]`.
        matrices: `[H, i, o]`.
        is_turned: whether they are `[..., o, i]`.

    Returns:
        `[B, H, q, o]`.
    """
    if states.shape[0] == 1:
        return _product(states, matrices, is_turned)
    batch, _, num_queries, _ = states.shape
    folded = _product(states.transpose(0, 1).flatten(1, 2), matrices, is_turned)
    return folded.unflatten(1, (batch, num_queries)).transpose(0, 1)


def _product(states: torch.Tensor, matrices: torch.Tensor, is_turned: bool) -> torch.Tensor:
    if not is_turned:
        return states @ matrices
    # The matrix first, as it lies: as the second factor and transposed, bfloat16 takes a CPU 5 times as long.
    return (matrices @ states.transpose(-1, -2)).transpose(-1, -2)


def projection_of(module: Any, query: torch.Tensor) -> LatentProjection | str:
    """The projection of an attention module of transformers, or why it cannot be absorbed.

    Args:
        module: an attention module with ``kv_b_proj`` and the widths.
        query: a tensor in the dtype and on the device of the queries.
    """
    if torch.is_autocast_enabled(query.device.type):
        return "autocast computes its kv_b_proj in another dtype"
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "torch has forward hooks for all modules, which would not be called for its kv_b_proj"
    widths, linear = Widths.of(module), module.kv_b_proj
    base, factors = linear, tuple[LatentFactors, ...]()
    if _is_lora(linear):
        found = _factors_of(linear, widths)
        if isinstance(found, str):
            return found
        base, factors = linear.get_base_layer(), found
    weight = _weight_of(base, query.dtype)
    return weight if isinstance(weight, str) else LatentProjection(linear, widths, base, weight, factors)


def of_heads(weight: torch.Tensor, widths: Widths) -> torch.Tensor:
    """Splits `[H · (dn + dv), ...]` by heads: `[H, dn + dv, ...]`."""
    return weight.unflatten(0, (-1, widths.nope + widths.value))


def _weight_of(linear: Any, dtype: torch.dtype) -> torch.Tensor | str | None:
    """The weight of a linear layer without adapters; None where the layer has to be asked, or why not even that."""
    weight = getattr(linear, "_parameters", {}).get("weight")
    is_known = type(linear) is nn.Linear or _is_quantized(linear)
    if not is_known or weight is None:
        return f"its kv_b_proj is a {type(linear).__name__}, of which nothing is known"
    if _is_watched(linear):
        return "hooks on its kv_b_proj would not be called"
    if linear.bias is not None:
        return "its kv_b_proj has a bias"
    hooks = hooks_of(linear)
    if any((type(hook).__module__, type(hook).__name__) not in _MOVERS for hook in hooks):
        return "a hook of accelerate's on its kv_b_proj does more than move weights"
    if hasattr(weight, "device_mesh"):
        if [str(placement) for placement in weight.placements] != ["S(0)"]:
            return f"its kv_b_proj is sharded as {weight.placements}"
        return weight.to_local() if weight.dtype == dtype else _other_dtype(weight, dtype)
    if "forward" in vars(linear) and not hooks:
        return "its kv_b_proj has a forward of its own"
    if weight.device.type == "meta" and not hooks:
        return "its kv_b_proj is on meta, and no hook of accelerate's brings it"
    # What brings or decodes a weight does so when its layer is called.
    if _is_quantized(linear) or weight.device.type == "meta" or type(weight) not in (nn.Parameter, torch.Tensor):
        return None
    return weight if weight.dtype == dtype else _other_dtype(weight, dtype)


def _other_dtype(weight: torch.Tensor, dtype: torch.dtype) -> str:
    return f"its kv_b_proj is in {weight.dtype} and the queries are in {dtype}"


def _is_watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_quantized(linear: Any) -> bool:
    classes = (getattr(sys.modules.get(module), name, None) for module, name in _QUANTIZED)
    return any(found is not None and inspect.isclass(found) and isinstance(linear, found) for found in classes)


def _is_lora(linear: Any) -> bool:
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(linear, layer.LoraLayer)


def _factors_of(linear: Any, widths: Widths) -> tuple[LatentFactors, ...] | str:
    """What the active adapters of a PEFT LoRA layer add to its base layer, or why that is no pair of factors."""
    if _is_watched(linear) or "forward" in vars(linear):
        return "the rows of this batch have adapters of their own on kv_b_proj, or hooks on it would not be called"
    if linear.disable_adapters:
        return "the adapters on its kv_b_proj are merged and switched off" if linear.merged else ()
    if linear.merged:
        return ()
    found: list[LatentFactors] = []
    for name in linear.active_adapters:
        if name not in linear.lora_A:
            continue
        a, b, dropout = linear.lora_A[name], linear.lora_B[name], linear.lora_dropout[name]
        if name in linear.lora_variant or not (type(a) is type(b) is nn.Linear) or b.bias is not None:
            return f"the adapter {name!r} on its kv_b_proj is not a plain LoRA"
        if any(_is_watched(part) or "forward" in vars(part) for part in (a, b, dropout)):
            return f"hooks on the adapter {name!r} on its kv_b_proj would not be called"
        if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.training):
            return f"the adapter {name!r} on its kv_b_proj drops inputs in training"
        if a.weight.device.type == "meta":
            return f"the adapter {name!r} on its kv_b_proj is on meta"
        found.append(LatentFactors(a.weight, of_heads(b.weight, widths), linear.scaling[name]))
    return tuple(found)
