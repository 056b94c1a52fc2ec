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
        return {}, str(error).splitlines()[0] if str(error) else type(error).__name__
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


def begin_rows(cache: KVCache, kwargs: dict[str, Any]) -> None:
    """Tells a cache which token of each row stands at position 0, as the arguments of a forward say."""
    if not cache.takes_mean or (cache.record.has_begun and cache.get_seq_length()):
        return
    tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if tokens is None:
        return
    batch, last = len(tokens), cache.get_seq_length() + tokens.shape[1] - 1
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    origins = [0] * batch
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and len(positions) in (1, batch):
        origins = [last - position for position in positions[:, -1].tolist()] * (batch // len(positions))
    for leaf in cache.leaves:
        leaf.begin_rows(tuple(origins))
    # A row of which only padding has been read has not begun.
    is_2d = isinstance(mask, torch.Tensor) and mask.dim() == 2
    cache.record.has_begun = not is_2d or bool((mask != 0).any(-1).all())


def _is_not_loaded(module: torch.nn.Module) -> bool:
    is_brought = hasattr(module, "_hf_hook")  # by accelerate, when the module runs
    return not is_brought and any(weight.is_meta for weight in module.parameters(recurse=False))
