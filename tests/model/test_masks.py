"""Masks that say nothing: what a causal attention makes of none depends on which tokens its queries are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hfkv
from tests import tiny
from tests.tiny import llama
from tests.zoo import NAMED, architectures, build, generate, prompt


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])  # their attention is an eager one: softcap, sink logits
def test_a_static_cache_shows_columns_behind_the_queries(name: str) -> None:
    sample = NAMED[name]()
    sample.model.set_attn_implementation("eager")
    inputs = prompt(sample.model, left_padding=False)
    tokens, logits = generate(sample.model, inputs, cache_implementation="static")
    with hfkv.patch(sample.model):
        ours, our_logits = generate(sample.model, inputs, cache_implementation="static")
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_wanted", [1, 3])
def test_layers_that_share_keys_may_see_the_last_queries_alone(num_wanted: int) -> None:
    model: Any = build(next(found for found in architectures() if str(found) == "causal-gemma4_text"))
    ids = prompt(model, left_padding=False)["input_ids"]
    with torch.no_grad():
        logits = model(ids, logits_to_keep=num_wanted).logits
        with hfkv.patch(model) as handle:
            for cache in (handle.new_cache(), DynamicCache(config=model.config)):
                ours = model(ids, past_key_values=cache, logits_to_keep=num_wanted).logits
                torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv", ["none", "int8"])
def test_a_mask_of_one_row_for_several_queries(kv: str) -> None:
    model = llama()
    ids = tiny.prompt(1)["input_ids"]
    logits = []
    for heads_mask in (torch.ones(1, 1, 1, 9, dtype=torch.bool), torch.ones(1, 1, 3, 9, dtype=torch.bool)):
        with torch.no_grad(), hfkv.patch(model, kv):
            cache = hfkv.KVCache(model, kv)
            model(ids[:, :6], past_key_values=cache)
            logits.append(model(ids[:, 6:], past_key_values=cache, attention_mask=heads_mask).logits)
    assert torch.allclose(*logits, atol=1e-5)
