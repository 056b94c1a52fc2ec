"""Tiny models of latent attention (MLA), family by family."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from hfkv.patches.mla import latent_modules
from tests.zoo import CannotBuild, architectures, build, prompt

DENSE = (
    "axk1",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
)
SPARSE = ("axk2", "deepseek_v32", "dots3_note", "glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4")
FAMILIES = (*DENSE, *SPARSE)
TOP_K = 4  # tokens an indexer picks, of the fifteen and more there are
CLOSE = {"atol": 1e-4, "rtol": 0}


@functools.cache
def built(family: str) -> Any:
    (architecture,) = [found for found in architectures() if found.model_type == family][:1] or [None]
    if architecture is None:
        pytest.skip(f"this transformers has no {family}")
    try:
        model = build(architecture)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = getattr(module, "index_kpool", TOP_K)  # glm5_next picks so many together
    return model


def model_of(family: str) -> Any:
    model = built(family)
    if not latent_modules(model):
        pytest.skip(f"this transformers caches expanded keys and values for {family}")
    return model


def inputs_for(model: Any, mode: str = "greedy") -> dict[str, torch.Tensor]:
    inputs = prompt(model)
    if "pixel_values" in inputs:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return {name: states[1:] for name, states in inputs.items()} if mode in ("prompt lookup", "assisted") else inputs
