"""Which tokens a cache holds is written down by the forwards that read them, or is not known."""

import pickle
from typing import Any

import pytest
import torch

import hfkv
from tests.tiny import greedy, llama, prompt

KV = "none+paged+page_size:8"
SHARED = KV + "+reuse"


def by_hand_at_own_positions(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model(ids[:, :30], position_ids=2 * torch.arange(30)[None], past_key_values=cache)


def by_hand_in_training(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model(ids[:, :30], past_key_values=cache)
    model.eval()


def by_hand_under_other_weights(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model(ids[:, :10], past_key_values=cache)
    weight = model.model.layers[0].self_attn.k_proj.weight
    before, weight.data = weight.data, 2 * weight.data
    model(ids[:, 10:30], past_key_values=cache)
    weight.data = before


def generated_then_by_hand(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model.generate(ids[:, :10], past_key_values=cache, max_new_tokens=1)
    by_hand = ids[:, cache.get_seq_length() : 30]
    model(by_hand, position_ids=torch.arange(by_hand.shape[1])[None] + 50, past_key_values=cache)


def generated_at_own_positions(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model.generate(ids[:, :10], past_key_values=cache, max_new_tokens=1)
    model.generate(ids[:, :30], past_key_values=cache, position_ids=2 * torch.arange(30)[None], max_new_tokens=1)


def saved_and_loaded(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    by_hand_at_own_positions(model, cache, ids)
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied.holds_tokens, cache.holds_tokens)


@pytest.mark.parametrize(
    "fill",
    [
        by_hand_at_own_positions,
        by_hand_in_training,
        by_hand_under_other_weights,
        generated_then_by_hand,
        generated_at_own_positions,
        saved_and_loaded,
    ],
)
def test_what_was_computed_in_another_way_never_comes_into_the_pool(fill: Any) -> None:
    model, inputs = llama(), prompt(1, 40)
    expected = greedy(model, inputs)
    with hfkv.patch(model, SHARED):
        cache = hfkv.KVCache(model, KV)
        with torch.no_grad():
            fill(model, cache, inputs["input_ids"])
        greedy(model, inputs, past_key_values=cache)
        assert torch.equal(greedy(model, inputs), expected)


def test_tokens_that_were_not_written_down_are_not_made_up() -> None:
    model, ids = llama(), prompt(1, 40)["input_ids"]
    with hfkv.patch(model, SHARED), torch.no_grad():
        cache = hfkv.KVCache(model, KV)
        model.model(ids[:, :10], past_key_values=cache)
        model(ids[:, 10:30], past_key_values=cache)
        assert cache.holds_tokens is None
        cache.crop(-20)
        assert cache.holds_tokens is None
        model(ids[:, 10:30], past_key_values=cache)
        assert cache.holds_tokens is None
        cache.reset()
        model(ids, past_key_values=cache)
        assert torch.equal(cache.holds_tokens, ids)
