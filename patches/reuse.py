"""The pool of prompt prefixes of a patched model: what may be shared, what is found, what is kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations import is_deepspeed_zero3_enabled

from hfkv.cache.kv_cache import KVCache
from hfkv.models.fingerprint import Fingerprint, fingerprint_of
from hfkv.models.parallel import parallel_plan_of
from hfkv.patches.handle import Patch
from hfkv.patches.prompt import learned_prompt
from hfkv.sharing.prefix_pool import page_keys

logger = logging.getLogger("hfkv")

# What a prompt of ids and left padding gives a model besides them.
PLAIN = {"attention_mask", "position_ids", "past_key_values", "input_ids", "cache_position"}


def root_of(
    model: Any, cache: KVCache, state: Fingerprint, generation_config: Any, model_kwargs: dict[str, Any]
) -> bytes | None:
    """The key under which this call's pages may be shared, or None where they may not."""
    patch: Patch = model.hfkv
    if patch.kv.reuse is None or cache.kv != patch.own_kv:
        return None
    if len(cache.layers) != patch.num_layers:  # an assistant that leaves its model early
        return None
    reason = _reason(model, state, generation_config, model_kwargs)
    if reason is not None:
        patch.log_once(f"{type(model).__name__}: a prompt is not shared: {reason}")
        return None
    return patch.root(state)


def _reason(model: Any, state: Fingerprint, generation_config: Any, model_kwargs: dict[str, Any]) -> str | None:
    extra = sorted(name for name, value in model_kwargs.items() if name not in PLAIN and is_input(value))
    if extra:
        return f"it is more than ids and left padding ({', '.join(extra)})"
    if generation_config.output_hidden_states or generation_config.output_attentions:
        return "hidden states or attentions of all of it are asked for"
    if learned_prompt(model) is not None:
        return "PEFT puts learned tokens before it"
    if model.training:
        return "the model is in training mode"
    if parallel_plan_of(model).replicas > 1 or is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled():
        return "processes with batches of their own exchange weights in every forward, and must run equally many"
    if state.has_hooks:
        return "the model has forward hooks, which may change what it computes"
    return None


def is_input(value: Any) -> bool:
    """Whether a keyword of `generate` is a part of the prompt: a tensor, or what holds one."""
    if isinstance(value, Mapping):
        return any(map(is_input, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_input, value))
    return value is not None and not isinstance(value, bool | int | float | str | PreTrainedTokenizerBase)


def positions_are_plain(positions: torch.Tensor | None, pads: Sequence[int], length: int) -> bool:
    """Whether position ids `[..., B, T]` count each row's text from 0."""
    if positions is None:
        return True
    if positions.shape[-1] != length or positions.shape[-2] not in (1, len(pads)):
        return False
    counted = torch.arange(length) - torch.tensor(pads)[:, None]
    return bool(((positions.cpu() == counted) | (counted < 0)).all())


def keep_pages(model: Any, cache: KVCache) -> None:
    """Keeps the whole pages of a cache's texts for later calls, once there are new ones."""
    patch: Patch = model.hfkv
    record, pool = cache.record, patch.pool
    if record.root is None or record.length // pool.page_size <= record.kept // pool.page_size:
        return
    record.kept = record.length
    tokens, pads = cache.holds_tokens, record.pads()
    if tokens is None or pads is None:
        record.root = None
        return
    keys = [page_keys(record.root, row[pad:], pool.page_size) for row, pad in zip(tokens, pads, strict=True)]
    if not pool.missing([key for row in keys for key in row]):
        return
    # Another thread may have changed the model since the prompt was looked up.
    state = fingerprint_of(model, patch.exact_rotary)
    if state.has_hooks or patch.kv.reuse is None or patch.root(state) != record.root:
        record.root = None
        return
    pool.take(cache.leaves, keys, pads)
