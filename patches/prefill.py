"""Reads prompts: one row for all its beams and samples, from the first token that no earlier call has read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hfkv.cache.kv_cache import KVCache
from hfkv.cache.record import TokenRecord
from hfkv.models.fingerprint import Fingerprint, fingerprint_of
from hfkv.models.padding import padding_of
from hfkv.models.parallel import agreed
from hfkv.patches.continuing import check_continues, check_takes_new_tokens, mask_of, text_length
from hfkv.patches.once import EXPANDED, Trial, one_of_each
from hfkv.patches.prompt import in_words, learned_prompt, read_anew
from hfkv.patches.reuse import positions_are_plain, root_of
from hfkv.sharing.prefix_pool import PrefixPool, page_keys


def prefill(
    model: Any,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool = True,
) -> Any:
    """Does what `_prefill` does, for a patched model.

    Raises:
        ValueError: the prompt is empty, or does not continue a used cache.
    """
    if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise ValueError("the prompt is empty: give at least one token (the bos token, say)")
    cache = model_kwargs.get("past_key_values")
    rest = (generation_config, model_kwargs, is_first_iteration)
    if model_kwargs.get("inputs_embeds") is not None and model.hfkv.kv.reuse is not None:
        model.hfkv.log_once(f"{type(model).__name__}: a prompt is not shared: it is embeddings")
    is_inner = generation_config.is_assistant and cache is not None and cache.get_seq_length()
    if not isinstance(cache, KVCache) or is_inner or model_kwargs.get("inputs_embeds") is not None:
        return type(model)._prefill(model, input_ids, *rest)
    generation_config = read_anew(model, cache, input_ids, generation_config, model_kwargs)
    rest = (generation_config, model_kwargs, is_first_iteration)
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if copies == 1 and not cache.record.is_wanted:
        return _read(model, cache, input_ids, *rest)
    try:
        state = begin(model, cache, input_ids, generation_config, model_kwargs, copies)
        output = _read_once(model, cache, input_ids, *rest, copies, state)
        if output is None:
            if copies > 1 and cache.batch_size == len(input_ids) // copies:
                cache.batch_repeat_interleave(copies)
            share(model, cache, input_ids, generation_config, model_kwargs)
            output = _read(model, cache, input_ids, *rest)
    finally:
        # From here on others may give the cache tokens; and beams and samples are many, most of them thrown away.
        if copies > 1 or not cache.record.is_temporary:
            cache.record.root = None
    return output


def begin(
    model: Any, cache: KVCache, ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], copies: int = 1
) -> Fingerprint:
    """Looks at the model, and refuses a used cache that does not go on with this prompt; see `check_continues`."""
    state = fingerprint_of(model, model.hfkv.exact_rotary)
    if (peft_model := learned_prompt(model)) is not None:
        state = replace(state, adapters=in_words(peft_model))
    cache.record.repeated = cache.record.root = None
    refusal: ValueError | RuntimeError | None = None
    root = None
    if cache.get_seq_length():
        length = text_length(generation_config, model_kwargs)
        try:
            check_continues(cache, ids, mask_of(model_kwargs), length, state, copies)
        except (ValueError, RuntimeError) as error:
            refusal = error
    else:
        root = root_of(model, cache, state, generation_config, model_kwargs)
    # A process that went on differently from the others of its model would wait for them for ever.
    fits, is_unhooked, may_share = agreed(model, [refusal is None, not state.has_hooks, root is not None])
    if not fits:
        raise refusal or ValueError(
            "another process of this model refuses its past_key_values, and says why; call cache.reset() in all of them"
        )
    if not cache.get_seq_length():
        cache.record.forget()
        cache.record.state = state
        cache.record.root = root if may_share else None
    return state if is_unhooked else replace(state, has_hooks=True)


def _read_once(
    model: Any,
    cache: KVCache,
    ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool,
    copies: int,
    state: Fingerprint,
) -> Any:
    """Reads one row of each prompt for all its copies; None where they have to be read row by row."""
    given = one_of_each(model, cache, ids, generation_config, model_kwargs, copies)
    if given is None or state.has_hooks:
        return None
    trial = Trial.of(model, cache, state)
    if trial is None:
        return None
    one = given.pop("input_ids")
    cache.expect_copies(copies, one.shape[1])
    share(model, cache, one, generation_config, given)
    output = _read(model, cache, one, generation_config, given, is_first_iteration)
    if not trial.holds(output, len(one)):
        return None
    cache.batch_repeat_interleave(copies)
    output["logits"] = output["logits"].repeat_interleave(copies, dim=0)
    return output


def _read(
    model: Any,
    cache: KVCache,
    ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool,
) -> Any:
    """Reads the part of the prompt that the cache does not hold."""
    chunk, first, last = generation_config.prefill_chunk_size, cache.get_seq_length(), ids.shape[1]
    mask_length = text_length(generation_config, model_kwargs)
    if first and mask_length not in (None, last) and chunk is not None:
        check_takes_new_tokens("prefill_chunk_size")
    if chunk is None or not first or (mask_length is not None and mask_length != last):
        return type(model)._prefill(model, ids, generation_config, model_kwargs, is_first_iteration)
    # transformers 5.17 reads a prompt in chunks from its first token, whatever the cache holds.
    whole = copy.copy(generation_config)
    whole.prefill_chunk_size = None
    output = None
    for end in (*range(first + chunk, last, chunk), last):
        whole._mask_length = end
        given = {
            name: value[..., :end] if name in EXPANDED and value is not None else value
            for name, value in model_kwargs.items()
        }
        output = type(model)._prefill(model, ids[:, :end], whole, given, is_first_iteration)
    return output


def share(model: Any, cache: KVCache, ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Puts into an empty cache what earlier calls have read of its prompts, except the last token."""
    record = cache.record
    if record.root is None or cache.get_seq_length():
        return
    mask = mask_of(model_kwargs)
    positions = model_kwargs.get("position_ids")
    pads = (0,) * len(ids) if mask is None else padding_of(mask != 0, len(ids))
    # A model that is given no positions may count padding as text.
    reason = None
    if pads is None or text_length(generation_config, model_kwargs) != ids.shape[1]:
        reason = "its attention mask hides more than left padding"
    elif (any(pads) and positions is None) or not positions_are_plain(positions, pads, ids.shape[1]):
        reason = "its positions do not count the text from 0"
    if pads is None or reason is not None:
        record.root = None
        model.hfkv.log_once(f"{type(model).__name__}: a prompt is not shared: {reason}")
        return
    pool: PrefixPool = model.hfkv.pool
    texts = [row[pad:] for row, pad in zip(ids.cpu(), pads, strict=True)]
    keys = [page_keys(record.root, text[:-1], pool.page_size) for text in texts]
    if len(keys) > 1:
        missing = _missing(model, pool, [key for row in keys for key in row])
        for row, end in _worth_reading_alone(missing, pool.page_size, keys, pads, ids.shape[1]):
            _read_alone(
                model, record, texts[row][None, :end].to(ids.device), keys[row], generation_config, model_kwargs
            )
    columns = _take_over(model, cache, ids, mask, keys, pads)
    for text, pad in zip(texts, pads, strict=True):
        pool.count(len(text), max(columns - pad, 0))


def _missing(model: Any, pool: PrefixPool, keys: Sequence[bytes]) -> set[bytes]:
    """The keys among `keys` that the pool of any of the model's processes lacks."""
    missing = pool.missing(keys)
    there = agreed(model, [key not in missing for key in keys])
    return {key for key, is_there in zip(keys, there, strict=True) if not is_there}


def _take_over(
    model: Any,
    cache: KVCache,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    keys: Sequence[Sequence[bytes]],
    pads: Sequence[int],
) -> int:
    """Copies the pages of all rows that the pool has into an empty cache; returns how many columns it then holds."""
    pool: PrefixPool = model.hfkv.pool
    with pool.found(keys) as found:
        pages = [row[:count] for row, count in zip(found, agreed(model, [*map(len, found)]), strict=True)]
        columns = min(pad + len(of_row) * pool.page_size for pad, of_row in zip(pads, pages, strict=True))
        if columns <= min(pads):
            return 0
        try:
            pool.give(cache.leaves, pages, pads, columns)
        except BaseException:
            cache.reset()  # some layers may hold them, others not
            raise
    cache.record.append(ids[:, :columns], columns, None if mask is None else mask[:, :columns])
    cache.record.kept = columns
    return columns


def _worth_reading_alone(
    missing: set[bytes], size: int, keys: Sequence[Sequence[bytes]], pads: Sequence[int], length: int
) -> list[tuple[int, int]]:
    """Chooses the rows of a batch to read by themselves first, and how far: (row, tokens of its text).

    All rows of a batch are read from one column on. Where some begin with pages that others lack, or several begin
    alike, it is less work to read what is missing once, page by page, and find it in the pool.

    Args:
        missing: the keys among `keys` that the pool lacks.
        size: tokens a page.
        keys: the keys of the pages of each row's text.
        pads: pad tokens of each row.
        length: tokens of each row, padding included.
    """
    batch = len(keys)
    # By the column where each page ends: those that would have to be read to begin there.
    ends = sorted({pad + (i + 1) * size for pad, row in zip(pads, keys, strict=True) for i in range(len(row))})
    missing = set(missing)
    read: set[bytes] = set()
    if not missing:
        return []
    best, best_cost, extra = 0, None, 0
    for column in (0, *ends):
        for pad, row in zip(pads, keys, strict=True):
            count = max(column - pad, 0) // size
            for key in row[max(count - 1, 0) : count]:
                if key in missing and key not in read:
                    read.add(key)
                    extra += size
        begin = min(
            pad + max(min(column - pad, len(row) * size), 0) // size * size for pad, row in zip(pads, keys, strict=True)
        )
        cost = extra + batch * (length - begin)
        if best_cost is None or cost < best_cost:
            best, best_cost = column, cost
    alone = []
    for row, (pad, of_row) in enumerate(zip(pads, keys, strict=True)):
        count = max(best - pad, 0) // size
        if missing.intersection(of_row[:count]):
            alone.append((row, count * size))
            missing -= set(of_row[:count])
    return alone


def _read_alone(
    model: Any,
    record: TokenRecord,
    ids: torch.Tensor,
    keys: Sequence[bytes],
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> None:
    """Reads the beginning of one row's text without padding, so that the pool has its pages.

    Args:
        model: the patched model.
        record: the record of the batch's cache, which has the key of its pages.
        ids: tokens of whole pages, int64 `[1, T]`, on the batch's device: offloaded weights tell none.
        keys: the keys of the pages of the row's whole text.
        generation_config, model_kwargs: the batch's own.
    """
    cache, pool, length = model.hfkv.new_cache(), model.hfkv.pool, ids.shape[1]
    mask = None if model_kwargs.get("attention_mask") is None else torch.ones_like(ids)
    given = {**model_kwargs, "attention_mask": mask, "past_key_values": cache}
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        given["position_ids"] = torch.arange(length, device=positions.device).expand(*positions.shape[:-2], 1, -1)
    alone = copy.copy(generation_config)
    alone._mask_length = length
    cache.reserve(length)
    cache.record.state, cache.record.root = record.state, record.root
    # A prompt needs one token at least that is not held.
    _take_over(model, cache, ids, None, [keys[: (length - 1) // pool.page_size]], (0,))
    _read(model, cache, ids, alone, given, True)
