"""`save_pretrained` of a model whose experts are packed: the file holds plain tensors, as it did."""

from __future__ import annotations

import functools
from typing import Any

from hfkv.experts.stack import ExpertStack
from hfkv.patches.undo import Undo


def set_saving(model: Any, undo: Undo) -> None:
    """Overrides `save_pretrained` on this instance."""
    inner = model.save_pretrained
    undo.set(model, "save_pretrained", functools.update_wrapper(functools.partial(_save, model), inner))


def _save(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    state = kwargs.get("state_dict")
    state = model.state_dict() if state is None else state
    kwargs["state_dict"] = {name: _plain(tensor) for name, tensor in state.items()}
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def _plain(tensor: Any) -> Any:
    return tensor.plain() if isinstance(tensor, ExpertStack) else tensor
