"""Hints: what to give `patch` instead of an object that holds a transformers model, or leads to one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hfkv.models.probe import base_model

# A client that wraps a pipeline that holds a model is three deep.
_DEEPEST = 3
_MOST_LOOKED_AT = 10_000
_LEAVES = (str, bytes, int, float, type, ModuleType, torch.Tensor, PreTrainedConfig, PreTrainedTokenizerBase)


def hint(given: Any) -> str:
    """Says where in `given` the model is, or how to get one.

    Args:
        given: an object that is no `PreTrainedModel` and no `PeftModel`.

    Returns:
        What to do, to end the message of an error.
    """
    if hasattr(given, "llm_engine"):
        return (
            "hfkv changes models that transformers runs, and vLLM runs its own: load the same checkpoint with "
            + _load()
        )
    path = _path_to_model(given)
    if path is not None:
        return f"give its {path}"
    if isinstance(given, str | PathLike):
        return f"load it first: {_load(str(given))}"
    if isinstance(given, PreTrainedConfig):
        return "make its model first: AutoModelForCausalLM.from_config(config), or with weights " + _load(
            given.name_or_path
        )
    if isinstance(given, PreTrainedTokenizerBase):
        return f"give its model: {_load(given.name_or_path)}"
    if isinstance(given, type) and issubclass(given, PreTrainedModel):
        return f"give an instance of it: {given.__name__}.from_pretrained(...)"
    return f"load one: {_load()}"


def _load(name: str = "") -> str:
    return f"AutoModelForCausalLM.from_pretrained({repr(name) if name else '...'})"


def _path_to_model(given: Any) -> str | None:
    """The attributes that lead to the nearest transformers model in `given`, such as ``.pipeline.model``, or None."""
    seen: dict[int, Any] = {}
    waiting = [("", given)]
    for _ in range(_DEEPEST):
        parts = [(path + step, part) for path, whole in waiting for step, part in _parts(whole)]
        for path, part in parts:
            if isinstance(part, torch.nn.Module) and isinstance(base_model(part), PreTrainedModel):
                return path
        waiting = []
        for path, part in parts:
            if id(part) not in seen and not isinstance(part, _LEAVES) and len(seen) < _MOST_LOOKED_AT:
                seen[id(part)] = part
                waiting.append((path, part))
    return None


def _parts(whole: Any) -> Iterator[tuple[str, Any]]:
    """The parts of an object, each with the code that gets it; no property is computed."""
    if isinstance(whole, list | tuple):
        yield from ((f"[{i}]", part) for i, part in enumerate(whole))
    elif isinstance(whole, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in whole.items())
    elif hasattr(whole, "__dict__") and not isinstance(whole, _LEAVES):
        held = vars(whole)
        # torch keeps the children of a module there.
        for name, part in {**(held.get("_modules") or {}), **held}.items():
            yield f"[{name}]" if name.isdigit() else f".{name}", part
