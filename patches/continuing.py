"""Refuses a used cache that the prompt, the weights or the adapters do not continue."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from hfkv.cache.kv_cache import KVCache
from hfkv.models.fingerprint import Fingerprint


def check_continues(
    cache: KVCache,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    mask_length: int | None,
    state: Fingerprint,
    copies: int,
) -> None:
    """Raises unless `ids` go on where `cache` ends.

    Args:
        cache: a used cache.
        ids: the prompt, int64 `[B, T]`: the whole text, or, where the mask is longer, only what is new.
        mask: 1 where a token is real, `[B, mask_length]`, or None where all are.
        mask_length: tokens of the whole text, as the mask tells it; None where there is none.
        state: the model's state now.
        copies: rows that each prompt has been expanded to, for beams or samples.

    Raises:
        ValueError: `ids` do not go on there; says where they part and how to go on.
        RuntimeError: an earlier forward has left the cache in pieces.
    """
    record, seen, held = cache.record, cache.get_seq_length(), cache.holds_tokens
    record.check_whole()
    difference = None if record.state is None else record.state.difference(state)
    if difference is not None:
        raise ValueError(
            f"past_key_values was filled by {difference}; this model would go on from keys and values that are not its "
            "own. Call cache.reset() and prefill again, or put the weights or adapters back"
        )
    rows, batch = len(ids), cache.batch_size
    if batch is not None and batch not in (rows, rows // copies):
        prompts = rows // copies
        remedy = f"give {_count(batch, 'prompt')}, or another cache"
        if batch == 1:
            remedy = f"give cache.fork({prompts})"
        elif prompts < batch:
            remedy = "choose its rows with cache.batch_select_indices()"
        raise ValueError(
            f"past_key_values holds {_count(batch, 'row')} and there {'is' if prompts == 1 else 'are'} "
            f"{_count(prompts, 'prompt')}: {remedy}"
        )
    if batch is not None and batch != rows:
        ids, mask = ids[::copies], mask if mask is None else mask[::copies]
    if mask_length is not None and mask_length != ids.shape[1]:
        if mask_length != seen + ids.shape[1]:
            raise ValueError(
                f"past_key_values holds {seen} tokens and the prompt adds {ids.shape[1]}, but the attention mask is of "
                f"{mask_length}: give the whole text, or its new tokens with a mask over all {seen + ids.shape[1]}"
            )
        if held is not None:
            _check_tokens(held, None, record.hidden(), mask, mask_length)
        return
    if held is not None:
        _check_tokens(held, ids, record.hidden(), mask, ids.shape[1])
    if ids.shape[1] <= seen:
        known = "" if held is not None else " (which ones is not known: they were not given to a patched model)"
        raise ValueError(
            f"past_key_values holds {seen} tokens{known} and the prompt has {ids.shape[1]}: a prompt is the whole text "
            f"and must go on behind what is held. cache.crop({ids.shape[1] - 1 - seen}) keeps the first "
            f"{ids.shape[1] - 1} tokens, a cache.fork() made earlier keeps them all, cache.reset() none"
        )


def _check_tokens(
    held: torch.Tensor, ids: torch.Tensor | None, hidden: torch.Tensor | None, mask: torch.Tensor | None, length: int
) -> None:
    """Raises ValueError unless a prompt begins as `held` does.

    Args:
        held: int64 `[B, seen]`.
        ids: the whole text, `[B, length]`; None where only what is new was given.
        hidden: which of `held` are padding; None where none is.
        mask: the mask of the whole text.
        length: tokens of the whole text.
    """
    shared = min(held.shape[1], length)
    given = held[:, :shared] if ids is None else ids[:, :shared].cpu()
    none = torch.zeros_like(given, dtype=torch.bool)
    was_hidden = none if hidden is None else hidden[:, :shared]
    is_hidden = none if mask is None else mask[:, :shared].cpu() == 0
    # The last tokens of a row that were read may be hidden from what follows: the padding behind one that ended. No
    # other, since positions count what is shown.
    is_behind_newly_hidden = (is_hidden & ~was_hidden).cumsum(1) > 0
    moved = ~is_hidden & (was_hidden | is_behind_newly_hidden)
    same = ~moved & ((given == held[:, :shared]) | is_hidden)
    if not bool(same.all()):
        _refuse_other_tokens(held, given, same, moved, length)


def _refuse_other_tokens(
    held: torch.Tensor, given: torch.Tensor, same: torch.Tensor, padding: torch.Tensor, length: int
) -> None:
    first = int((~same).any(dim=0).nonzero()[0])
    row = int((~same[:, first]).nonzero()[0])
    where = (
        f"past_key_values holds {_count(held.shape[1], 'token')} that the prompt does not continue: at position "
        f"{first} row {row}"
    )
    if bool(padding[row, first]):
        raise ValueError(
            f"{where} differs in its padding. What is held keeps its place: rows of different lengths are padded "
            "behind it, between what is held and what is new. cache.reset() starts anew"
        )
    # A prompt needs one token at least that is not held.
    keep = min(first, length - 1)
    going_on = [f"to add {_count(length, 'new token')} alone, give an attention_mask of all {held.shape[1] + length}"]
    if keep:
        going_on.append(f"cache.crop({keep - held.shape[1]}) keeps the {_count(keep, 'token')} that are alike")
        going_on.append("a cache.fork() made before they part goes on by itself")
    raise ValueError(
        f"{where} has token {int(given[row, first])} where the cache holds {int(held[row, first])}. A prompt is the "
        f"whole text: {'; '.join(going_on)}; cache.reset() starts anew"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def mask_of(model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The padding mask of a prompt; None where all tokens are real."""
    mask = model_kwargs.get("attention_mask")
    return None if mask is None or bool((mask != 0).all()) else mask


def text_length(generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """The number of tokens in a prompt's padding mask, including those a cache holds; None without a mask."""
    mask = model_kwargs.get("attention_mask")
    # generate() drops one that hides nothing.
    return getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]


def check_takes_new_tokens(what: str) -> None:
    """Refuses to go on from new tokens alone where this transformers would read them at the wrong positions.

    Raises:
        NotImplementedError: this transformers would.
    """
    if "_mask_length" not in GenerationConfig.__annotations__:
        raise NotImplementedError(
            f"{what} in transformers {transformers.__version__} misplaces new tokens that are given alone with a mask "
            "over all: give the whole text, or update transformers"
        )
