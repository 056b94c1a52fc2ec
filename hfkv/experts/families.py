"""Families: which modules of a model are experts that transformers' experts interface runs, and which are not."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# What a module has whose class transformers marks with `use_experts_implementation`.
_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
_LOOKS_LIKE_EXPERTS = re.compile(r"(Experts|MoE|Moe|SparseMLP|SparseMoeBlock)$")


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The experts modules of a model that go through the interface, by name; each once, however often it is used."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def is_experts(module: Any) -> bool:
    """Whether the experts interface runs this module."""
    return all(hasattr(module, mark) for mark in _MARKS)


def weight_names(experts: Any) -> tuple[str, str]:
    """The names of the parameters into an expert and out of it."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def others_of(model: nn.Module) -> dict[str, str]:
    """The modules that look like experts and run their own code, by name, with the reason.

    In transformers 5.23 llama4, dbrx, jetmoe, longcat_flash, nllb_moe, switch_transformers, step3p7 and doge have such.
    """
    covered = experts_of(model)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _LOOKS_LIKE_EXPERTS.search(type(module).__name__) or is_experts(module):
            continue
        if any(_is_within(other, name) or _is_within(name, other) for other in (*covered, *found)):
            continue
        found[name] = f"{type(module).__name__} does not go through transformers' experts interface"
    return found


def no_experts(model: nn.Module) -> str:
    """Why a model without experts of the interface cannot have ours, in words."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    others = others_of(model)
    if others:
        name, reason = next(iter(others.items()))
        return (
            f"{kind}: {reason} ({name}, and {len(others) - 1} more); leave moe out"
            if len(others) > 1
            else (f"{kind}: {reason} ({name}); leave moe out")
        )
    return f"{kind} has no experts; hfkv.upcycle(model) makes them of its dense layers, or leave moe out"


def _is_within(name: str, other: str) -> bool:
    return name.startswith(f"{other}.") if other else True
