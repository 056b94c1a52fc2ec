"""A text read through a cache, chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from hfkv.cache.kv_cache import KVCache
from hfkv.models.probe import base_model
from hfkv.patches.keys.means import wants_means
from hfkv.patches.patch import patch
from hfkv.policy.config import KVConfig

if TYPE_CHECKING:
    pass

# Tokens a forward: so that most of a text is read through what the cache kept of it.
CHUNK = 128


class CacheReader:
    """Reads texts through a cache of one config, in a model patched by the caller: ``with patch(model): ...``.

    Any patch will do: a cache that is passed to a patched model is used as it is.

    Args:
        model: A causal language model, or a `PeftModel` around one, not patched yet.
        kv: What the cache keeps; a `KVConfig`, its string form, or None: lossless.
        calibration: What the mean of keys is taken over, where a codec takes one; see `hfkv.patch`.

    Attributes:
        kv: The config.
        cache: The cache of the text being read; see `start`.

    Raises:
        TypeError, ValueError: The model cannot be read so, or `kv` does not fit it.
        RuntimeError: The model is patched already.
    """

    cache: KVCache

    def __init__(self, model: Any, kv: KVConfig | str | None = None, calibration: Any = None) -> None:
        check_model(model)
        self._model = model
        # What this config needs of the model is found out here, and not again for every text.
        wanted = KVConfig.of(kv)
        with patch(model, wanted, calibration=calibration if wants_means(wanted) else None) as handle:
            self.kv, self._rotary, self._key_means = handle.kv, handle.rotary, handle.key_means

    def start(self, num_tokens: int | None = None) -> None:
        """Begins a text with a fresh cache: memory for `num_tokens` at once, as in `generate`, or as it fills."""
        self.cache = KVCache(base_model(self._model), self.kv, self._rotary, self._key_means)
        if num_tokens is not None:
            self.cache.reserve(num_tokens)

    @torch.inference_mode()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads the next tokens of the text.

        Args:
            ids: Tokens, [B, T], int64, on the model's device.

        Returns:
            The logits, [B, T, V], in the model's dtype.
        """
        logits: torch.Tensor = self._model(ids, past_key_values=self.cache, use_cache=True).logits
        return logits


def check_model(model: Any) -> None:
    """Refuses models that do not read one text through one cache.

    Raises:
        ValueError: The model is an encoder-decoder, or has a PEFT adapter that puts its own states before a forward.
    """
    config = base_model(model).config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: it reads a text without the cache. hfkv.eval measures "
            "decoder-only models (AutoModelForCausalLM)"
        )
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"the adapter ({adapter.peft_type.value}) puts learned states before every forward, also in the middle of "
            "a text that is read in chunks; hfkv.eval measures LoRA and the like"
        )


def chunk_slices(num_tokens: int, chunk: int) -> list[slice]:
    """Cuts a text: `chunk` tokens a piece and the last token alone.

    The last token goes in alone, as in generation: by then a window has let go of what left it.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    edges = [*range(0, num_tokens - 1, chunk), max(num_tokens - 1, 0), num_tokens]
    return [slice(start, stop) for start, stop in pairwise(edges)]


class _Once(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Logs what `hfkv.patch` says of a model once while the context lasts, however often it is patched."""
    logger, once = logging.getLogger("hfkv"), _Once()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)
