"""Saving, by `save_pretrained`, of a model whose experts are kept in another form."""

from __future__ import annotations

import functools
from typing import Any

from hfkv.experts.checkpoint import ExpertsQuantizer
from hfkv.experts.stack import ExpertStack
from hfkv.patches.undo import Undo


def set_saving(model: Any, undo: Undo) -> None:
    """Overrides `save_pretrained` on this instance."""
    undo.override(_save, model, "save_pretrained", needs_patch=False)


def _save(
    model: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Saves plain tensors, as before the patch; or experts in int8 or int4, where the model says so."""
    quantizer = getattr(model, "hf_quantizer", None)
    save = functools.partial(type(model).save_pretrained, model, save_directory, is_main_process)
    if isinstance(quantizer, ExpertsQuantizer):
        with quantizer.given(state_dict):
            return save(None, *args, **kwargs)
    state = model.state_dict() if state_dict is None else state_dict
    return save({name: _plain(tensor) for name, tensor in state.items()}, *args, **kwargs)


def _plain(tensor: Any) -> Any:
    return tensor.plain() if isinstance(tensor, ExpertStack) else tensor
