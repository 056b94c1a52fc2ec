"""Keys and values that are assigned to a layer: what is held stays where it was, and halves are told."""

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig, Window
from tests.tiny import feed, llama, llama_config, states, text


@pytest.mark.parametrize("kv", ["none", "none+window:8+sinks:2"])
def test_assigning_what_is_held_keeps_the_positions(kv: str) -> None:
    cache = KVCache(llama_config(), kv)
    for _ in range(6):
        feed(cache, 4, 5)
    layer = cache.layers[0]
    keys = layer.keys.clone()
    layer.keys, layer.values = layer.keys, layer.values
    assert cache.get_seq_length() == 30
    layer.keys, layer.values = layer.keys[[0, 2]], layer.values[[0, 2]]
    assert torch.equal(layer.keys, keys[[0, 2]])
    assert cache.get_seq_length() == 30
    if cache.kv.window:
        with pytest.raises(ValueError, match="their positions are unknown"):
            layer.keys, layer.values = states(2, 3), states(2, 3)


def test_half_an_assignment_does_not_outlive_a_reset() -> None:
    cache = KVCache(llama_config())
    feed(cache, 1, 5)
    layer = cache.layers[0]
    layer.keys = states(1, 3)
    with pytest.raises(RuntimeError, match="keys were assigned to this layer without the other half"):
        layer.update(states(), states())
    cache.reset()
    feed(cache, 1, 5)
    assert layer.keys.shape[2] == 5
    layer.keys = states(1, 3)
    with pytest.raises(ValueError, match="differ in batch or tokens"):
        layer.values = states(1, 4)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("length", range(3, 14))
def test_assigning_a_layers_own_keys_at_a_pages_edge(length: int, page_size: int) -> None:
    model = llama()
    kv = KVConfig(window=Window(1, 0, summary="mean", summary_pages=2, summary_page_size=page_size))
    with torch.no_grad(), hfkv.patch(model, kv) as patch:
        caches = [KVCache(model, kv, patch.rotary) for _ in range(2)]
        for cache in caches:
            model(text(1, length), past_key_values=cache)
            model(torch.tensor([[5]]), past_key_values=cache)
        for layer in caches[0].layers:
            layer.keys = layer.keys * 1.0
            layer.keys, layer.values = layer.keys, layer.values
        first, second = (model(torch.tensor([[7]]), past_key_values=cache).logits for cache in caches)
    assert torch.equal(first, second)
    assert caches[0].get_seq_length() == length + 2
