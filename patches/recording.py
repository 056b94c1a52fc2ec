"""Gives every forward of a patched model a cache, and writes down which tokens it is given."""

from __future__ import annotations

from typing import Any

import torch

from hfkv.cache.kv_cache import KVCache
from hfkv.cache.record import what_failed
from hfkv.models.fingerprint import fingerprint_of
from hfkv.patches.fresh_cache import check_cache, log_stock_cache, parameters, with_cache
from hfkv.patches.keys.means import begin_rows
from hfkv.patches.override import inner_forward
from hfkv.patches.reuse import keep_pages
from hfkv.patches.undo import Undo
from hfkv.policy.errors import CacheMemoryError


def set_recording(model: Any, undo: Undo) -> None:
    """Overrides `forward` on this instance."""
    undo.override_forward(_forward, model)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    forward, kwargs = inner_forward(model), with_cache(model, args, kwargs)
    names = parameters(type(model)) if args else ()
    if 1 < len(args) <= len(names) and not kwargs.keys() & set(names[: len(args)]):
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    cache = kwargs.get("past_key_values")
    if isinstance(cache, KVCache):
        if model.config.is_encoder_decoder:
            check_cache(model, cache)
        begin_rows(cache, {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs)
    if not isinstance(cache, KVCache) or not cache.record.is_wanted:
        output = forward(*args, **kwargs)
        if isinstance(cache, KVCache):
            log_stock_cache(model, cache, getattr(output, "past_key_values", None))
        return output
    record, before = cache.record, cache.get_seq_length()
    record.check_whole()
    if before == 0 and (record.length or not record.is_known):
        record.forget()
    if before != record.length:
        record.is_known = False  # some of what is held was not written down
    if before == 0 and record.state is None:
        record.state = fingerprint_of(model, model.hfkv.exact_rotary)
    if record.repeated is not None:
        kwargs = _without_repeated(cache, kwargs)
    try:
        output = forward(*args, **kwargs)
    except BaseException as error:
        # A pipeline's other stages leave their layers empty.
        held = [leaf.get_seq_length() for leaf in cache.leaves if leaf.is_initialized]
        is_whole = record.broken is None and min(held, default=before) >= before and cache.take_back(before)
        if not is_whole:
            record.broken = record.broken or what_failed(error)
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) and not isinstance(error, CacheMemoryError):
            raise CacheMemoryError.of(error, cache) from error
        raise
    ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], torch.Tensor) else None)
    count = cache.get_seq_length() - before
    record.append(ids, count, kwargs.get("attention_mask"))
    log_stock_cache(model, cache, getattr(output, "past_key_values", None))
    if record.root is not None:
        keep_pages(model, cache)
    return output


def _without_repeated(cache: KVCache, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without the tokens that `cache` holds: assisted decoding gives the whole text first."""
    assert cache.record.repeated is not None
    (repeated, giver), cache.record.repeated = cache.record.repeated, None
    ids, held = kwargs.get("input_ids"), cache.holds_tokens
    if giver() is None or ids is None or ids.shape[1] <= repeated:
        return kwargs  # that call has failed before it came to a forward
    if held is not None and not torch.equal(ids[:, :repeated].cpu(), held):
        return kwargs
    given = dict(kwargs)
    for name in ("input_ids", "position_ids"):
        if given.get(name) is not None:
            given[name] = given[name][..., repeated:]
    return given
