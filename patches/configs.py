"""Copies of a model's configs, made once for each patch: another model that shares them keeps its settings."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hfkv.patches.undo import Undo


def own_configs(model: PreTrainedModel, undo: Undo) -> None:
    """Gives every module of `model` copies of its configs, once for each `undo`.

    What is set in the copies before `Undo.settle` is not carried back to the originals; later changes are.
    """
    if undo.has_copies:
        return
    memo: dict[int, Any] = {}
    originals: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                undo.set(module, name, copy.deepcopy(value, memo))
                originals[id(value)] = value
    undo.stand_in([(original, memo[key]) for key, original in originals.items()])
