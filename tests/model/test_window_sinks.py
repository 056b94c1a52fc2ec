"""Attention sinks: prompts shorter than they are, positions in the cache, and scores in half precision."""

import copy

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig, Window
from tests import brute_force
from tests.tiny import greedy, llama, llama_for, prompt, text
from tests.windowed import RULES


@pytest.mark.parametrize(
    "kv", ["window:16+sinks:8", "window:100+sinks:50", "int8+window:16+sinks:15+paged+page_size:4"]
)
def test_chunks_smaller_than_the_sinks(kv: str) -> None:
    model, inputs = llama_for(kv), prompt(length=20)
    with hfkv.patch(model, kv):
        whole = greedy(model, inputs)
        for chunk in (1, 2, 7):
            assert torch.equal(whole, greedy(model, inputs, prefill_chunk_size=chunk))


@pytest.mark.parametrize("window", RULES[1:], ids=["cache", "summary"])
def test_a_model_cast_after_the_patch_turns_by_its_rounded_frequencies(window: Window) -> None:
    model, kv = llama(), KVConfig(window=window)
    patch = hfkv.patch(model, kv)
    before = patch.rotary
    assert patch.rotary is before
    model.to(torch.bfloat16).float()
    assert patch.rotary is not before
    hfkv.unpatch(model)
    cast = copy.deepcopy(model)
    ids = text(1, 300)
    with torch.no_grad():
        expected = brute_force.logits(cast, ids, kv)
        with hfkv.patch(model, kv) as again:
            ours = model(ids, past_key_values=KVCache(model, kv, again.rotary)).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_half_precision_scores_do_not_overflow() -> None:
    model = llama().half()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.k_proj.weight.data *= 40
    kv = KVConfig(window=Window(6, 2, sink_positions="cache"))
    with torch.no_grad(), hfkv.patch(model, kv):
        assert model(text(1, 30), past_key_values=KVCache(model, kv)).logits.isfinite().all()
