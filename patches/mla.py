"""Latent attention (MLA): what a cache returns reaches the ``"hfkv"`` attention as it is, not expanded."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn

from hfkv.attention.function import NAME
from hfkv.attention.latent.projection import projection_of
from hfkv.attention.latent.view import latent_views
from hfkv.models.latents import METHOD, expands_what_was_cached
from hfkv.patches.override import does
from hfkv.patches.undo import Undo

logger = logging.getLogger("hfkv")

_PARAMETERS = ["self", "kv_nope", "k_rot"]
_NEEDED = ("kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def set_latent_attention(model: nn.Module, undo: Undo) -> int:
    """Overrides `expand_kv` on every attention module that caches latents.

    Returns:
        The number of such modules.

    Raises:
        NotImplementedError: transformers' method has changed.
        RuntimeError: another patched model has the same module.
    """
    found = [module for module in latent_modules(model) if _is_to_be_overridden(module)]
    for module in found:
        _check(type(module))
        undo.override(_expand_kv, module, METHOD, (model,), needs_patch=False)
    return len(found)


def latent_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that expand what a cache returned."""
    found = (module for module in model.modules() if hasattr(type(module), METHOD))
    return [
        module
        for module in found
        if all(hasattr(module, name) for name in _NEEDED) and expands_what_was_cached(type(module))
    ]


def _is_to_be_overridden(module: Any) -> bool:
    kind, given = type(module), vars(module).get(METHOD)
    if does(given, _expand_kv):
        raise RuntimeError(
            f"a {kind.__name__} of this model is part of another patched model; take that patch off first"
        )
    if given is None and getattr(kind, METHOD).__module__.startswith("transformers.models."):
        return True
    logger.warning("%s has an %s of its own: it expands its latents for every step", kind.__name__, METHOD)
    return False


def _check(module_class: Any) -> None:
    parameters = list(inspect.signature(getattr(module_class, METHOD)).parameters)
    if parameters != _PARAMETERS:
        raise NotImplementedError(
            f"{module_class.__name__}.{METHOD} takes {parameters} in this version of transformers; hfkv overrides one "
            f"that takes {_PARAMETERS}. Use a version of transformers this hfkv supports"
        )


def _expand_kv(module: Any, model: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
    if module.config._attn_implementation == NAME:
        views = latent_views(module, kv_nope, k_rot, functools.partial(_say, model))
        if views is not None:
            return views
    return type(module).expand_kv(module, kv_nope, k_rot)


def _say(model: Any, what: str) -> None:
    if "hfkv" in vars(model):
        model.hfkv.log_once(f"{type(model).__name__}: {what}")


def latent_reason(model: Any, dtype: torch.dtype) -> str | None:
    """Why attention to latents cannot be captured, in words, or None: expanded, it reads no lengths from the device.

    Args:
        model: the patched model.
        dtype: the latents' dtype.
    """
    for module in latent_modules(model):
        projection = projection_of(module, torch.empty(0, dtype=dtype, device=next(module.parameters()).device))
        if isinstance(projection, str):
            return f"{type(module).__name__} expands its latents at every step: {projection}"
    return None
