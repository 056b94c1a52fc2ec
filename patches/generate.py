"""Gives every `generate` call of a model a fresh hfkv cache."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache

from hfkv.cache.kv_cache import KVCache
from hfkv.patches.attention import keep_attention
from hfkv.patches.continuing import check_takes_new_tokens, text_length
from hfkv.patches.fresh_cache import HOOK, cache_as_before, check_cache, fresh_cache, self_attention_of
from hfkv.patches.prefill import begin, prefill, share
from hfkv.patches.prompt import check_candidates, expect_prefix
from hfkv.patches.undo import Undo

BATCHING = "init_continuous_batching"
# Private methods of transformers that are overridden on the instance, as they were when this was written.
SIGNATURES = {
    HOOK: ["self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"],
    "_prefill": ["self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"],
    "_get_candidate_generator": [
        "self",
        "generation_config",
        "input_ids",
        "inputs_tensor",
        "logits_processor",
        "model_kwargs",
        "assistant_model",
        "target_tokenizer",
        "assistant_tokenizer",
    ],
}


def check_generate(model: PreTrainedModel) -> None:
    """Refuses a model whose `generate` would never ask the hook for a cache.

    Raises:
        TypeError: the model cannot generate.
        ValueError: its `generate` does not use a layered cache from the hook.
        NotImplementedError: the hook's signature is not the one this was written for.
    """
    name = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"{name} has no generate(); patch the model that has one (AutoModelForCausalLM, say)")
    for method, expected in SIGNATURES.items():
        given = list(inspect.signature(getattr(type(model), method)).parameters)
        if given != expected:
            raise NotImplementedError(
                f"{name}.{method} takes {given}; hfkv knows {expected}. Use an explicit cache: "
                "model.generate(past_key_values=hfkv.KVCache(model, kv=...))"
            )
    if not model._supports_default_dynamic_cache():
        raise ValueError(f"{name} does not use a layered KV cache; hfkv has nothing to replace in it")
    if type(model).generate is not GenerationMixin.generate and not _reaches_hook(type(model)):
        raise ValueError(
            f"{name} has a generate() of its own that never asks for a layered KV cache; if it holds a text "
            "decoder that does (model.text_decoder, say), patch that"
        )


def _reaches_hook(model_class: type) -> bool:
    """Whether a class that overrides `generate` still goes through transformers' own, or calls the hook itself."""
    own = model_class.__mro__[: model_class.__mro__.index(GenerationMixin)]
    sources = [inspect.getsource(base) for base in own if "generate" in vars(base)]
    return any("super().generate(" in source or HOOK in source for source in sources)


def set_generate_hooks(model: PreTrainedModel, undo: Undo) -> None:
    """Overrides `_prepare_cache_for_generation`, `_prefill` and `_get_candidate_generator` on this instance."""
    undo.override(_prepare_cache, model, HOOK)
    undo.override(prefill, model, "_prefill")
    undo.override(_get_candidate_generator, model, "_get_candidate_generator")
    if hasattr(type(model), BATCHING):
        undo.override(_refuse_batching, model, BATCHING)


def _refuse_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "transformers' continuous batching (generate_batch, cache_implementation='paged', transformers serve) keeps "
        f"keys and values in pages of its own, where kv={str(self.hfkv.kv)!r} would have no effect and which the "
        '"hfkv" attention cannot read: call hfkv.unpatch(model) before it, and patch the model again after it; or use '
        "model.generate()"
    )


def _get_candidate_generator(self: Any, **kwargs: Any) -> Any:
    """Makes the candidate generator, and looks at the prompt: assisted decoding calls no `_prefill`."""
    check_candidates(self)
    ids, model_kwargs = kwargs["input_ids"], kwargs["model_kwargs"]
    cache = model_kwargs.get("past_key_values")
    inner = getattr(cache, "self_attention_cache", None)
    if isinstance(inner, KVCache) and inner.get_seq_length():
        raise NotImplementedError(
            "assisted decoding and prompt lookup of an encoder-decoder give the decoder its whole text, and "
            f"past_key_values holds {inner.get_seq_length()} tokens of it, which would be read twice (as they are in "
            "transformers' own caches): give a fresh cache, or go on without an assistant"
        )
    if not isinstance(cache, KVCache) or not cache.record.is_wanted or model_kwargs.get("inputs_embeds") is not None:
        return type(self)._get_candidate_generator(self, **kwargs)
    config, record = kwargs["generation_config"], cache.record
    begin(self, cache, ids, config, model_kwargs)
    share(self, cache, ids, config, model_kwargs)
    if not record.is_temporary:
        record.root = None
    generator = type(self)._get_candidate_generator(self, **kwargs)
    gives_all = text_length(config, model_kwargs) in (None, ids.shape[1])
    if not gives_all:
        check_takes_new_tokens("assisted decoding and prompt lookup")
    if gives_all and cache.get_seq_length():
        record.repeated = (cache.get_seq_length(), weakref.ref(generator))
    return generator


def _prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    keep_attention(self)
    given, result = model_kwargs.get("past_key_values"), None
    known = cache_as_before(self, generation_config) if given is None else None
    if known is None:
        result = getattr(type(self), HOOK)(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    if given is not None:
        check_cache(self, given)
        _check_fits(given, self)
        expect_prefix(self, given if isinstance(given, KVCache) else None)
        own = self_attention_of(given)
        if not isinstance(own, KVCache):
            self.hfkv.log_once(f"{type(self).__name__} was given a {type(own).__name__}: kv has no effect on it")
        return result
    cache = model_kwargs.get("past_key_values") if known is None else known
    if cache is None or generation_config.cache_implementation not in (None, "dynamic"):
        asked = (
            "use_cache=False" if cache is None else f"cache_implementation={generation_config.cache_implementation!r}"
        )
        self.hfkv.log_once(
            f"{type(self).__name__} was asked for {asked}: hfkv leaves such calls alone, and kv has no effect"
        )
        expect_prefix(self, None)
        return result
    model_kwargs["past_key_values"] = fresh_cache(self, cache) if known is None else known
    check_cache(self, model_kwargs["past_key_values"])
    own: KVCache = self_attention_of(model_kwargs["past_key_values"])
    own.record.is_temporary = not generation_config.return_dict_in_generate
    # Where memory ends, what has been generated is to be found.
    is_offloaded = own.offload is not None
    own.record.is_wanted = not own.record.is_temporary or self.hfkv.kv.reuse is not None or is_offloaded
    own.reserve(max_cache_length + expect_prefix(self, own))
    if generation_config.is_assistant:
        own.activate_past_recording()
    return result


def _check_fits(cache: Any, model: Any) -> None:
    own = self_attention_of(cache)
    if not isinstance(own, KVCache):
        return
    expected = model.config.get_text_config(decoder=True)
    num_layers = len(DynamicCache(config=expected).layers)
    if (own.model_type, len(own.layers)) != (expected.model_type, num_layers):
        raise ValueError(
            f"past_key_values was built for a {own.model_type!r} model of {len(own.layers)} layers, and this is a "
            f"{expected.model_type!r} model of {num_layers}; build it with KVCache(model, kv=...)"
        )
