"""The lm-evaluation-harness, with a model that reads and writes through an hfkv cache."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from hfkv.eval.reader import CacheReader
from hfkv.patches.patch import patch
from hfkv.policy.config import KVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any  # for typing.get_type_hints, without the import


def lm_eval_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, kv: KVConfig | str | None = None, **options: Any
) -> Any:
    """Make a model of the lm-evaluation-harness whose every forward goes through an hfkv cache.

    Give it to ``lm_eval.simple_evaluate(model=...)``. The model itself is patched while a request runs and as it was
    in between. Loglikelihoods are scored as the harness does it: prompt and continuation in one forward, shorter rows
    padded on the right, which no earlier token sees. Generation is `generate` of the patched model; where a policy
    takes no padded rows, leave `batch_size` at 1.

    Args:
        model: A causal language model, or a `PeftModel` around one, not patched.
        tokenizer: Its tokenizer.
        kv: What the cache keeps; a `KVConfig`, its string form, or None: lossless.
        **options: Keywords of `lm_eval.models.huggingface.HFLM`, such as ``batch_size=8`` or ``max_length=2048``.

    Returns:
        An `HFLM`; its `kv` is the config.

    Raises:
        ImportError: lm-eval is not installed.
        TypeError, ValueError: The model is no decoder-only one, or `kv` does not fit it.
        RuntimeError: The model is patched already.
    """
    return _cached_hflm()(model, tokenizer, kv, **options)


@functools.cache
def _cached_hflm() -> type:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f'lm_eval_model needs the lm-evaluation-harness ({error}): pip install "hfkv[eval]"'
        ) from error

    class CachedHFLM(HFLM):
        def __init__(self, model: Any, tokenizer: Any, kv: Any, **options: Any) -> None:
            # Refuses what does not fit before a task is loaded for it.
            self._reader = CacheReader(model, kv)
            self.kv = self._reader.kv
            super().__init__(pretrained=model, tokenizer=tokenizer, **{"backend": "causal", **options})

        def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
            if attn_mask is not None or labels is not None:
                raise ValueError(
                    "the harness asked for an encoder-decoder's forward (attn_mask, labels); hfkv.eval takes "
                    'decoder-only models: leave backend="causal"'
                )
            autocast = torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            )
            with autocast, patch(self.model):
                self._reader.start(inps.shape[1])
                return self._reader.read(inps)

        def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with patch(self.model, self.kv):
                return super()._model_generate(*args, **kwargs)

    return CachedHFLM
