"""Gradients and the cache: a forward runs and leaves no graph behind, and a backward pass through the cache raises."""

import copy
import gc
import weakref

import pytest
import torch

import hfkv
from hfkv import KVCache
from tests.tiny import llama, prompt, text


def test_a_trained_prefix_in_the_cache_is_not_silently_left_out_of_the_backward_pass() -> None:
    model = llama()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    prefix = torch.randn(1, 2, 3, 16, requires_grad=True)
    cache = KVCache(model)
    for layer_idx in range(2):
        cache.update(prefix, prefix, layer_idx)
    logits = model(torch.tensor([[5, 6]]), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="gradients do not flow through an hfkv cache"):
        logits.sum().backward()


def test_a_forward_with_gradients_leaves_no_graph_in_the_cache() -> None:
    model = llama()
    cache = KVCache(model)
    keys: list[weakref.ref[torch.Tensor]] = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, inputs, output: keys.append(weakref.ref(output))
    )
    model(text(1, 8), past_key_values=cache)
    hook.remove()
    with torch.no_grad():
        model(text(1, 1), past_key_values=cache)
    gc.collect()
    assert len(keys) == 1
    assert keys[0]() is None
    assert copy.deepcopy(cache).get_seq_length() == 9
    loss = model(text(1, 1), past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="gradients do not flow through an hfkv cache"):
        loss.backward()


@pytest.mark.parametrize("kv", ["none", "int8"])
@pytest.mark.parametrize("trained", [["v_proj"], ["k_proj", "lm_head"], ["v_proj", "down_proj"]])
def test_a_backward_pass_through_the_cache_raises_whatever_is_trained(kv: str, trained: list[str]) -> None:
    model = llama()
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in trained))
    ids = prompt()["input_ids"]
    with hfkv.patch(model, kv):
        loss = model(ids, labels=ids, past_key_values=hfkv.KVCache(model, kv)).loss
        with pytest.raises(RuntimeError, match="gradients do not flow through an hfkv cache"):
            loss.backward()
