"""LoRA on experts: PEFT's adapters are read as thin factors, where PEFT multiplies them out for every expert."""

from __future__ import annotations

import functools
import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from hfkv.experts.adapters import ADOPT, Factors, applied
from hfkv.experts.families import experts_of, is_experts
from hfkv.experts.implementation import NAME
from hfkv.patches.undo import Undo

_METHOD = "_activate_lora"


def set_expert_lora(model: nn.Module, undo: Undo) -> None:
    """Overrides how PEFT's wrappers around experts apply adapters; later wrappers are found when the model runs."""
    adopt(model, undo)
    for experts in experts_of(model).values():
        # A partial, so that a deep copy of the model adopts its own.
        undo.set(experts, ADOPT, functools.partial(_adopt_later, model))


def adopt(model: nn.Module, undo: Undo) -> int:
    """Overrides every PEFT wrapper around a parameter of experts; returns how many were new."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper_class = getattr(layer, "ParamWrapper", None)
    if wrapper_class is None or not _is_known(wrapper_class):
        return 0
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, wrapper_class) and _METHOD not in vars(module) and is_experts(module.get_base_layer())
    ]
    for wrapper in wrappers:
        undo.override(_activate, wrapper, _METHOD, needs_patch=False)
    return len(wrappers)


def _adopt_later(model: Any) -> None:
    if "hfkv" in vars(model):
        adopt(model, model.hfkv._undo)


def _is_known(wrapper_class: Any) -> bool:
    """Whether PEFT's private method is the one this was written for; else PEFT goes on multiplying adapters out."""
    method = getattr(wrapper_class, _METHOD, None)
    return method is not None and list(inspect.signature(method).parameters) == ["self", "active_adapters"]


def _activate(wrapper: Any, active_adapters: list[str]) -> AbstractContextManager[None]:
    """Stands in for PEFT's `_activate_lora`: nothing is multiplied out."""
    experts = wrapper.get_base_layer()
    named = [name for name in active_adapters if name in wrapper.lora_A]
    if not named:
        return nullcontext()
    if experts.config._experts_implementation != NAME or wrapper.num_experts == 1:
        return getattr(type(wrapper), _METHOD)(wrapper, active_adapters)
    return applied(experts, wrapper.parameter_name, tuple(_factors(wrapper, name, experts) for name in named))


def _factors(wrapper: Any, adapter: str, experts: Any) -> Factors:
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a = a.view(wrapper.num_experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    scaling = wrapper.scaling[adapter]
    # PEFT takes the parameter's last two dimensions for inputs and outputs, in this order, unless it has swapped them.
    if wrapper._did_swap_in_out_features or experts.is_transposed:
        return Factors(a, b, scaling)
    return Factors(b.transpose(1, 2), a.transpose(1, 2), scaling)
