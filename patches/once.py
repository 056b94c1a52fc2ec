"""Reads one row of a prompt for all its beams and samples, where that is known to give the same as reading each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from transformers import cache_utils

from hfkv.cache.kv_cache import KVCache
from hfkv.cache.layers.base import CacheLayer
from hfkv.models.fingerprint import Fingerprint
from hfkv.models.parallel import agreed
from hfkv.patches.handle import Patch
from hfkv.patches.module_memory import ModuleMemory
from hfkv.patches.reuse import is_input

# What is expanded row by row, and can be taken back.
EXPANDED = {"attention_mask", "position_ids"}
# Outputs whose rows may lie in any of their dimensions.
_ASKED_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def one_of_each(
    model: Any, cache: KVCache, ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], copies: int
) -> dict[str, Any] | None:
    """The inputs of a `_prefill` for one row of each prompt; None where the rows have to be read one by one."""
    rows, batch = len(ids), cache.batch_size
    if copies == 1 or rows % copies or (batch is not None and batch == rows):
        return None
    if model.config.is_encoder_decoder or not all(map(_repeats, cache.layers)):
        return None
    configs = (generation_config, model.config, model.config.get_text_config(decoder=True))
    if any(getattr(config, name, None) for config in configs for name in _ASKED_OUTPUTS):
        return None
    given = {**model_kwargs, "input_ids": ids}
    for name in ("input_ids", *EXPANDED):
        value = given.get(name)
        if value is None:
            continue
        # Positions of several dimensions have the rows in the last but one.
        most = 3 if name == "position_ids" else 2
        if not isinstance(value, torch.Tensor) or value.dim() > most or value.shape[-2] not in (1, rows):
            return None
        if value.shape[-2] == rows:
            given[name] = value[..., ::copies, :]
            if not torch.equal(given[name].repeat_interleave(copies, dim=-2), value):
                return None
    known = {"input_ids", "past_key_values", *EXPANDED}
    return None if any(is_input(value) for name, value in given.items() if name not in known) else given


def _repeats(layer: Any) -> bool:
    """Whether a cache layer is known to repeat its rows: a model's own kind may hold more than it says."""
    return isinstance(layer, CacheLayer) or type(layer).__module__ == cache_utils.__name__


class Trial:
    """A first reading of one row for all its copies: it shows whether cache and logits are all that rows leave.

    Models may keep state of the rows in their modules, in a cache of their own, or in more outputs. Then the rows are
    read one by one, this time and from now on.
    """

    def __init__(self, model: Any, cache: KVCache, key: Hashable, known: frozenset[str] | None) -> None:
        self._model, self._cache, self._key, self._known = model, cache, key, known
        self._spare = cache.fork() if known is None or cache.get_seq_length() == 0 else None
        self._memory = ModuleMemory(model) if known is None else None

    @classmethod
    def of(cls, model: Any, cache: KVCache, state: Fingerprint) -> Trial | None:
        """Begins a trial; None where it is known that the rows have to be read one by one."""
        patch: Patch = model.hfkv
        key = (state.model, state.adapters, frozenset(map(type, model.modules())))
        known = patch.reads_once.get(key, frozenset())
        return None if known is None else cls(model, cache, key, known if key in patch.reads_once else None)

    def holds(self, output: Any, rows: int) -> bool:
        """Whether the cache and `output`, of `rows` rows, say all; else everything is put back as it was before.

        Raises:
            RuntimeError: a model that has not done so before returns more, and the used cache cannot go back.
        """
        reason = self._reason(output, rows)
        patch: Patch = self._model.hfkv
        (fits,) = map(bool, agreed(self._model, [reason is None]))
        patch.reads_once = {self._key: _others(output) if fits else None}
        if fits:
            return True
        reason = reason or "another process of this model found more than keys and values"
        name = type(self._model).__name__
        if self._spare is None:
            raise RuntimeError(
                f"{name} has read one row of a prompt for all its beams or samples, and {reason}: the cache cannot"
                " take back what it has read. Call cache.reset(), or go on from an earlier cache.fork(): from now on"
                " rows are read one by one"
            )
        patch.log_once(f"{name}: beams and samples of a prompt are read row by row: {reason}")
        if self._memory is not None:
            self._memory.restore()
        cache, spare = self._cache, self._spare
        cache.layers, cache.record, cache.offload = spare.layers, spare.record, spare.offload
        return False

    def _reason(self, output: Any, rows: int) -> str | None:
        """Says what there is besides keys, values and logits."""
        where = None if self._memory is None else self._memory.changed()
        if where is not None:
            return f"the model keeps state in its modules ({where})"
        if output.get("past_key_values") is not self._cache:
            return "the model keeps a cache of its own"
        if output["logits"].dim() != 3 or len(output["logits"]) != rows:
            return f"its logits are {list(output['logits'].shape)} for {rows} rows"
        for name in _others(output):
            # What the modules have held before is of all rows.
            is_known = name in (self._known or ()) if self._memory is None else output[name] in self._memory
            if not is_known:
                return f"the model returns {name}"
        return None


def _others(output: Any) -> frozenset[str]:
    """The fields of an output besides logits and cache."""
    others = output.keys() - {"logits", "past_key_values"}
    return frozenset(name for name in others if output[name] is not None)
