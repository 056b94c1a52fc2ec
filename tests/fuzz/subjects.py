"""Models that `generate` is asked of: stock, patched, and an assistant that is right now and then."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch

import hfkv
from tests.fuzz.calls import run, stock_cache
from tests.fuzz.cases import Case
from tests.fuzz.refusals import is_documented
from tests.zoo import NAMED, architectures, build
from tests.zoo.outcomes import difference

# By hand, or from the zoo, where state in modules, shared layers, capacity experts and odd decoders are.
NAMES = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen3_moe",
    "gpt2",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "phi3",
    "opt",
    "bloom",
    "cohere2",
    "t5",
    "bart",
    "whisper",
    "causal-gemma3n_text",
    "causal-gemma4_text",
    "causal-recurrent_gemma",
    "causal-diffllama",
    "causal-lfm2",
    "causal-deepseek_v32",
    "s2s-nllb-moe",
    "s2s-pegasus_x",
)
KVS = (
    "none",
    "none+paged+page_size:4",
    "none+offload",
    "none+offload+paged+page_size:4",
    "none+paged+page_size:4+reuse",
)


class Subject:
    """One architecture, stock, and as `kv` makes it."""

    def __init__(self, name: str, kv: str, dtype: torch.dtype = torch.float32) -> None:
        self.stock = model_of(name).to(dtype)
        self.ours = copy.deepcopy(self.stock)
        self.handle = hfkv.patch(self.ours, kv)
        self.was_refused = False
        self.assistant = _worse(self.stock)
        if "gemma2" in name:  # transformers 5.17's sdpa drops the softcap without a word
            self.stock.set_attn_implementation("eager")
        self.eager = copy.deepcopy(self.stock)
        with contextlib.suppress(ValueError):  # it has no other
            self.eager.set_attn_implementation("eager")

    def difference(self, case: Case) -> str | None:
        """Where the patched model's outcome of a case is not stock's, or None."""
        for model in (self.stock, self.eager, self.ours):
            # A static cache is as long as the longest before it, and attention weights show its empty columns.
            vars(model).pop("_previous_max_cache_length", None)
            vars(model).pop("_cache", None)  # so in transformers 5.17
        stock = self.eager if case.options.get("output_attentions") else self.stock
        expected = run(stock, case, lambda: stock_cache(stock), self.assistant, is_stock=True)
        ours = run(self.ours, case, self._new_cache, self.assistant)
        self.was_refused = is_documented(ours)
        found = None if self.was_refused else difference(expected, ours)
        return None if found is None or self._is_near_tie(expected, case) else found

    def _is_near_tie(self, expected: Any, case: Case) -> bool:
        """Whether stock code itself writes other tokens in float64: then rounding decides, on any machine anew."""
        exact = copy.deepcopy(self.stock).double()
        found = run(exact, case, lambda: stock_cache(exact), _worse(exact), is_stock=True)
        if isinstance(expected, Exception) or isinstance(found, Exception):
            return False
        return any(difference(its["sequences"], their["sequences"]) for its, their in zip(expected, found, strict=True))

    def _new_cache(self) -> Any:
        own = self.handle.new_cache()
        stock = stock_cache(self.stock)
        if hasattr(stock, "self_attention_cache"):
            stock.self_attention_cache = own
            return stock
        return own


def model_of(name: str) -> Any:
    """A tiny model by its name in `NAMED` or in the zoo."""
    if name in NAMED:
        return NAMED[name]().model
    return build(next(found for found in architectures() if str(found) == name))


@torch.no_grad()
def _worse(model: Any) -> Any:
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for weight in assistant.parameters():
        weight += (0.02 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    return assistant
