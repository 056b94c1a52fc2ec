"""The means that are taken off the keys of a patched model, and where the rows of a forward begin."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from hfkv.cache.kv_cache import KVCache
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean
from hfkv.kernels.dispatch import attention_kernel
from hfkv.models.fingerprint import fingerprint_of
from hfkv.models.key_means import find_key_means
from hfkv.models.probe import REMEDY
from hfkv.policy.config import KVConfig
from hfkv.policy.ports import port

logger = logging.getLogger("hfkv")

# Tokens that means are taken over at most. More change little: see docs/reference/quality.md.
MOST_TOKENS = 512
_SEED = 0

# What was found for a model, for its state and the tokens that it read.
_found: weakref.WeakKeyDictionary[Any, tuple[bytes, torch.Tensor, dict[int, KeyMean]]] = weakref.WeakKeyDictionary()


def wants_means(kv: KVConfig) -> bool:
    """Whether some layer of a cache has a codec that gains by a mean."""
    return any(each.key_mean and _gains(each) for each in (kv, *kv.layers.values()))


def _gains(kv: KVConfig) -> bool:
    names = (kv.codec,) if kv.recent is None else (kv.codec, kv.recent.codec)
    return any(Codecs.named(name).key.takes_mean for name in names)


def key_means(model: Any, calibration: Any, exact_rotary: bool) -> tuple[dict[int, KeyMean], str | None]:
    """The means of a model's keys, by layer, and why there are none.

    Args:
        model: a transformers model.
        calibration: what it reads: token ids `[T]`, a text or None for the bundled one; see `hfkv.patch`.
        exact_rotary: whether its rotary angles are computed in float64.

    Raises:
        TypeError, ValueError: `calibration` is no text.
    """
    if any(_is_not_loaded(part) for part in model.modules()):
        return {}, "its weights are not loaded"
    ids = _ids(model, calibration)[:MOST_TOKENS]
    state = fingerprint_of(model, exact_rotary).key("")
    known = _found.get(model)
    if known is not None and known[0] == state and torch.equal(known[1], ids):
        return known[2], None
    try:
        means = find_key_means(model, ids)
    except (ValueError, IndexError, RuntimeError) as error:  # as models raise that want more than ids, or others
        said = str(error).partition("\n")[0].removesuffix(f"; {REMEDY}")
        return {}, said or type(error).__name__
    if not all(bool(mean.vector.isfinite().all()) for mean in means.values()):
        return {}, "some of its keys are not finite on the text that they are measured on"
    _found[model] = state, ids, means
    return means, None


def slower_kernels(means: dict[int, KeyMean], kv: KVConfig, dtype: torch.dtype) -> str | None:
    """Why attention has no kernel with a mean where it has one without, in words; None where it has, or has none."""
    for index, mean in means.items():
        name, width = kv.for_layer(index).codec, mean.vector.shape[1]
        if not Codecs.named(name).key.takes_mean:
            continue
        asked = name, dtype, mean.vector.device, 1, (width, width)
        plain, kernel = attention_kernel(*asked), attention_kernel(*asked, has_mean=True)
        if plain.run is not None and kernel.run is None:
            return kernel.reason
    return None


def _ids(model: Any, calibration: Any) -> torch.Tensor:
    """Token ids `[T]` of what a model is to read; any tokens where there is no tokenizer for the bundled text."""
    try:
        ids: torch.Tensor = port("calibration_ids")(model, calibration, most=MOST_TOKENS, is_local=calibration is None)
        return ids
    except ValueError as error:
        if calibration is not None:
            raise
        logger.info("%s: the mean of its keys is taken over random tokens: %s", type(model).__name__, error)
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(config.vocab_size, (MOST_TOKENS,), generator=generator)


def begin_rows(cache: KVCache, given: dict[str, Any]) -> None:
    """Tells a cache which token of each row stands at position 0, as the arguments of a forward say.

    What is held of a row's text stays where it was written: only rows of which no more than padding is held begin.
    """
    if not cache.takes_mean:
        return
    before, padding = cache.get_seq_length(), cache.leaves[0].span.padding
    if before and (padding.began is None or max(padding.began, default=0) < before):
        return
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if not isinstance(tokens, torch.Tensor):
        return
    batch, last = len(tokens), before + tokens.shape[1]
    origins, began = [0] * batch, [before] * batch
    if before and padding.began is not None:
        origins, began = list(padding.origins or origins), list(padding.began)
        if len(began) != batch:
            return  # which the cache refuses
    positions = given.get("position_ids")
    has_positions = isinstance(positions, torch.Tensor) and positions.dim() == 2 and len(positions) in (1, batch)
    firsts = _first_real(given.get("attention_mask"), batch, last)
    there = [max(first, before) for first in firsts]
    if has_positions:
        index = torch.tensor([min(first, last - 1) - before for first in there], device=positions.device)
        at = positions.expand(batch, -1).gather(1, index[:, None])[:, 0].tolist()
    for row, first in enumerate(there):
        if not before or began[row] >= before:
            began[row] = first
            origins[row] = first - at[row] if has_positions and first < last else 0
    for leaf in cache.leaves:
        leaf.begin_rows(tuple(origins), tuple(began))


def _first_real(mask: Any, batch: int, length: int) -> list[int]:
    """The first token of each row that is no padding, as a mask of a forward says; `length` where there is none."""
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or not mask.numel():
        return [0] * batch
    if mask.dim() == 4:
        # What the newest query sees begins with the text; one of padding sees itself at most.
        newest = mask[:, 0, -1, :length]
        is_real = newest.clone() if mask.dtype == torch.bool else newest > torch.finfo(newest.dtype).min / 2
        is_real[:, -1] &= is_real[:, :-1].any(-1)
    else:
        is_real = mask[:, :length] != 0
    found = torch.where(is_real.any(-1), is_real.int().argmax(-1), length)
    return found.expand(batch).tolist()


def _is_not_loaded(module: torch.nn.Module) -> bool:
    is_brought = hasattr(module, "_hf_hook")  # by accelerate, when the module runs
    return not is_brought and any(weight.is_meta for weight in module.parameters(recurse=False))
