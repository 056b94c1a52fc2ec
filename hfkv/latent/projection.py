"""`Projection`: the matrix that expands latents into keys and values, taken apart so that it can be absorbed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

# Linear layers that give what their weights say for every row alike, however those are written.
_QUANTIZED = (
    ("bitsandbytes.nn", "Linear4bit"),
    ("bitsandbytes.nn", "Linear8bitLt"),
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
)


class Widths(NamedTuple):
    """The widths of a layer with latent attention.

    Attributes:
        latent: r, of what is cached for keys and values together.
        nope: dn, of the part of a head's key that comes from the latent.
        rotary: dr, of the part that carries the position, the same for all heads.
        value: dv.
    """

    latent: int
    nope: int
    rotary: int
    value: int

    @classmethod
    def of(cls, module: Any) -> Widths:
        """Those of an attention module of transformers."""
        return cls(module.kv_lora_rank, module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim)


class Factors(NamedTuple):
    """What LoRA adds to the matrix: ``scaling · B A``, never multiplied out.

    Attributes:
        a: `[k, r]`.
        b: `[H, dn + dv, k]`.
        scaling: LoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Projection:
    """``kv_b_proj`` as it is in this forward: views of its weight, nothing that could go stale.

    Attributes:
        linear: the layer itself.
        widths: of what it maps.
        weight: `[H, dn + dv, r]`, or `[B, H, dn + dv, r]` where rows have matrices of their own.
        factors: of the adapters that are active.
    """

    linear: Any
    widths: Widths
    weight: torch.Tensor
    factors: tuple[Factors, ...] = ()

    @property
    def has_own_rows(self) -> bool:
        """Whether each row of the batch has a matrix of its own."""
        return self.weight.dim() == 4

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything a result depends on."""
        yield self.weight
        for factors in self.factors:
            yield from (factors.a, factors.b)

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[B, H, q, dn + dr]` as queries of latents, `[B, H, q, r + dr]`: the keys' half is folded in."""
        nope, rotary = query.split((self.widths.nope, self.widths.rotary), dim=-1)
        absorbed = by_head(nope, self.weight[..., : self.widths.nope, :])
        for a, b, scaling in self.factors:
            added = by_head(nope.to(b.dtype), b[:, : self.widths.nope]) @ a
            absorbed = (absorbed + added * scaling).to(query.dtype)
        return torch.cat((absorbed, rotary), dim=-1)

    def release(self, attended: torch.Tensor) -> torch.Tensor:
        """Sums of latents `[B, H, q, r]` as sums of values `[B, H, q, dv]`: the values' half is folded in."""
        released = by_head(attended, self.weight[..., self.widths.nope :, :], is_turned=True)
        for a, b, scaling in self.factors:
            thin = attended.to(a.dtype) @ a.t()
            added = by_head(thin, b[:, self.widths.nope :], is_turned=True)
            released = (released + added * scaling).to(attended.dtype)
        return released

    def expand(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[B, 1, n, r]` as the keys' part without positions `[B, H, n, dn]` and values `[B, H, n, dv]`."""
        nope, value = self.widths.nope, self.widths.value
        # Of three dimensions: bitsandbytes' 8-bit product takes no more.
        expanded = self.linear(latents[:, 0]).unflatten(2, (-1, nope + value)).transpose(1, 2)
        return expanded.split((nope, value), dim=-1)


def by_head(states: torch.Tensor, matrices: torch.Tensor, is_turned: bool = False) -> torch.Tensor:
    """States times a matrix a head; no matrix is copied for the rows of a batch.

    Args:
        states: `[B, H, q, i]`.
        matrices: `[H, i, o]`, or `[B, H, i, o]` where rows have their own.
        is_turned: whether they are `[..., o, i]`.

    Returns:
        `[B, H, q, o]`.
    """
    if matrices.dim() == 4 or states.shape[0] == 1:
        return _product(states, matrices, is_turned)
    batch, _, num_queries, _ = states.shape
    folded = _product(states.transpose(0, 1).flatten(1, 2), matrices, is_turned)
    return folded.unflatten(1, (batch, num_queries)).transpose(0, 1)


def _product(states: torch.Tensor, matrices: torch.Tensor, is_turned: bool) -> torch.Tensor:
    if not is_turned:
        return states @ matrices
    # The matrix first, as it lies: as the second factor and transposed, bfloat16 takes a CPU 5 times as long.
    return (matrices @ states.transpose(-1, -2)).transpose(-1, -2)


def projection_of(module: Any, dtype: torch.dtype) -> Projection | str:
    """The projection of an attention module of transformers, or why it cannot be absorbed.

    Args:
        module: with ``kv_b_proj`` and the widths.
        dtype: of the queries.
    """
    widths, linear = Widths.of(module), module.kv_b_proj
    factors: tuple[Factors, ...] = ()
    if _is_lora(linear):
        found = _factors_of(linear, widths)
        if isinstance(found, str):
            return found
        factors, linear = found, linear.get_base_layer()
    weight = _weight_of(linear, widths.latent, dtype)
    if isinstance(weight, str):
        return weight
    return Projection(module.kv_b_proj, widths, _of_heads(weight, widths), factors)


def projection_by_rows(module: Any, batch: int, like: torch.Tensor) -> Projection:
    """The projection of any module that is linear for each row of a batch, from what it makes of a unit matrix.

    Args:
        module: see `projection_of`.
        batch: B.
        like: of the dtype and on the device of the latents.
    """
    widths = Widths.of(module)
    unit = torch.eye(widths.latent, dtype=like.dtype, device=like.device).expand(batch, -1, -1)
    matrices = module.kv_b_proj(unit).transpose(1, 2)  # [B, H * (dn + dv), r]
    return Projection(module.kv_b_proj, widths, matrices.unflatten(1, (-1, widths.nope + widths.value)))


def _of_heads(weight: torch.Tensor, widths: Widths) -> torch.Tensor:
    return weight.unflatten(0, (-1, widths.nope + widths.value))


def _weight_of(linear: Any, width: int, dtype: torch.dtype) -> torch.Tensor | str:
    """`[H · (dn + dv), r]` of a linear layer without adapters, or why there is none."""
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "hooks on its kv_b_proj would not be called"
    if getattr(linear, "bias", None) is not None:
        return "its kv_b_proj has a bias"
    weight = linear._parameters.get("weight")
    if weight is None:
        return f"its kv_b_proj is a {type(linear).__name__}, whose weight is not known"
    is_put_away = weight.device.type == "meta"
    if is_put_away and not hasattr(linear, "_hf_hook"):
        return "its kv_b_proj is on meta, and no hook of accelerate's brings it"
    if _is_quantized(linear) or is_put_away:
        # What brings or decodes the weight does so when it is called.
        unit = torch.eye(width, dtype=dtype, device=_device_of(linear, weight))
        return linear(unit).t()
    if type(linear) is not nn.Linear:
        return f"its kv_b_proj is a {type(linear).__name__}, of which nothing is known"
    if hasattr(weight, "device_mesh"):
        if [str(placement) for placement in weight.placements] != ["S(0)"]:
            return f"its kv_b_proj is sharded as {weight.placements}"
        weight = weight.to_local()
    elif "forward" in vars(linear) and not hasattr(linear, "_hf_hook"):
        return "its kv_b_proj has a forward of its own"
    if weight.dtype != dtype:
        return f"its kv_b_proj is in {weight.dtype} and the queries are in {dtype}"
    return weight


def _device_of(linear: Any, weight: torch.Tensor) -> torch.device:
    """Where a linear layer computes."""
    hook = getattr(linear, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return weight.device


def _is_quantized(linear: Any) -> bool:
    classes = (getattr(sys.modules.get(module), name, None) for module, name in _QUANTIZED)
    return any(found is not None and inspect.isclass(found) and isinstance(linear, found) for found in classes)


def _is_lora(linear: Any) -> bool:
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(linear, layer.LoraLayer)


def _factors_of(linear: Any, widths: Widths) -> tuple[Factors, ...] | str:
    """What the active adapters of a LoRA layer of PEFT's add to its base layer, or why that is no pair of factors."""
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "the rows of this batch have adapters of their own on kv_b_proj"
    if linear.disable_adapters:
        return "the adapters on its kv_b_proj are merged and switched off" if linear.merged else ()
    if linear.merged:
        return ()
    found: list[Factors] = []
    for name in linear.active_adapters:
        if name not in linear.lora_A:
            continue
        a, b = linear.lora_A[name], linear.lora_B[name]
        if name in linear.lora_variant or not (type(a) is type(b) is nn.Linear) or b.bias is not None:
            return f"the adapter {name!r} on its kv_b_proj is not a plain LoRA"
        if linear.training and not isinstance(linear.lora_dropout[name], nn.Identity):
            return f"the adapter {name!r} on its kv_b_proj drops inputs in training"
        if a.weight.device.type == "meta":
            return f"the adapter {name!r} on its kv_b_proj is on meta"
        found.append(Factors(a.weight, _of_heads(b.weight, widths), linear.scaling[name]))
    return tuple(found)
