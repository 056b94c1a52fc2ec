"""The views of a `Step`: one pair serves the layers of a forward, unless somebody keeps it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hfkv
from hfkv import KVCache
from hfkv.attention.function import hfkv_attention
from hfkv.kernels.native.library import library
from tests.tiny import feed, llama, prompt
from tests.unit.test_step import KINDS, LAYERS, cache_of

MODULE = llama(num_hidden_layers=1).model.layers[0].self_attn
native = pytest.mark.skipif(library() is None, reason="no native kernels")


def new_tokens(batch: int = 2, tokens: int = 1, heads: int = 2) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, 16)


def ready(kv: str) -> KVCache:
    cache = cache_of(kv)
    cache.reserve(64)
    for tokens in (9, 1, 1):
        feed(cache, 2, tokens)
    return cache


@pytest.mark.parametrize("kv", KINDS)
def test_a_view_that_is_kept_goes_on_showing_its_own_layer(kv: str) -> None:
    cache = ready(kv)
    kept = [cache.update(new_tokens(), new_tokens(), layer) for layer in range(LAYERS)]
    assert len({id(key) for key, _ in kept}) == len({id(key.held) for key, _ in kept}) == LAYERS
    for (key, value), layer in zip(kept, cache.layers, strict=True):
        assert key.held.store is layer.store
        assert torch.equal(key.decoded()[:, :, -1:], layer.keys[:, :, -1:])
        assert torch.equal(value.decoded()[:, :, -1:], layer.values[:, :, -1:])


@pytest.mark.parametrize("kept", ["key", "value", "tokens"])
def test_half_of_what_is_shown_is_kept_with_the_other(kept: str) -> None:
    cache = ready("none")
    key, value = cache.update(new_tokens(), new_tokens(), 0)
    held = {"key": key, "value": value, "tokens": key.held}[kept]
    del key, value
    cache.update(new_tokens(), new_tokens(), 1)
    tokens = held if kept == "tokens" else held.held
    assert tokens.store is cache.layers[0].store


def test_a_view_with_a_weak_reference_to_it_is_no_other_layers() -> None:
    cache = ready("none")
    key, value = cache.update(new_tokens(), new_tokens(), 0)
    weak = weakref.ref(key)
    del key, value
    cache.update(new_tokens(), new_tokens(), 1)
    assert weak() is None or weak().held.store is cache.layers[0].store


def test_a_view_that_nobody_keeps_serves_the_next_layer() -> None:
    cache = ready("none")
    seen = []
    for layer in range(LAYERS):
        key, value = cache.update(new_tokens(), new_tokens(), layer)
        assert torch.equal(key.decoded(), cache.layers[layer].keys)
        assert torch.equal(value.decoded(), cache.layers[layer].values)
        seen.append(id(key))
        del key, value
    assert len(set(seen)) == 1
    feed(cache, 2, 1)
    key, _ = cache.update(new_tokens(), new_tokens(), 0)
    assert key.shape[2] == 14, "a view has the length of its own step"


@pytest.mark.parametrize("kv", ["none", "paged", "int8+window:6+sinks:2"])
@pytest.mark.parametrize("way", ["deleted", "reset", "rows"])
def test_views_that_wait_hold_no_memory(kv: str, way: str) -> None:
    cache: Any = ready(kv)
    cache.update(new_tokens(), new_tokens(), 0)
    gc.collect()
    gc.disable()
    try:
        planes = [weakref.ref(layer.store.planes[0]) for layer in cache.layers]
        stores = [weakref.ref(layer.store) for layer in cache.layers]
        if way == "deleted":
            del cache
        elif way == "reset":
            cache.reset()
        else:
            cache.batch_repeat_interleave(2)
            planes, stores = ([] if kv == "paged" else planes), []
        assert all(found() is None for found in (*planes, *stores))
    finally:
        gc.enable()


@native
@pytest.mark.parametrize("kv", ["int8", "int8+paged", "fp8+window:6+sinks:2", "paged"])
def test_tensors_that_lie_otherwise_than_the_first_layers_are_taken_too(kv: str) -> None:
    """A layer's keys and queries may be slices, or transposed, where another's are in one piece."""
    cache, plain = ready(kv), None
    keys, values, query = new_tokens(), new_tokens(), new_tokens(heads=4)
    for layer, of in enumerate((lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), widened)):
        views = cache.update(of(keys), of(values), layer)
        out = hfkv_attention(MODULE, of(query), *views, None, scaling=0.25)[0]
        held = cache.layers[layer].keys, cache.layers[layer].values
        assert out.is_contiguous()
        if "window" not in kv:
            states = (states.repeat_interleave(2, dim=1) for states in held)
            expected = scaled_dot_product_attention(query, *states, scale=0.25).transpose(1, 2)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        plain = plain or held
        assert torch.equal(plain[0][:, :, -1:], held[0][:, :, -1:])
        assert torch.equal(plain[1][:, :, -1:], held[1][:, :, -1:])


def widened(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), dim=-1).flatten(-2)[..., ::2]


@native
@pytest.mark.parametrize("kv", ["none", "int8", "paged"])
def test_layers_may_scale_their_scores_each_in_its_own_way(kv: str) -> None:
    cache, query = ready(kv), new_tokens(heads=4)
    for layer, scale in enumerate((0.25, 1.5, None)):
        key, value = cache.update(new_tokens(), new_tokens(), layer)
        out = hfkv_attention(MODULE, query, key, value, None, scaling=scale)[0]
        del key, value
        held = (states.repeat_interleave(2, dim=1) for states in (cache.layers[layer].keys, cache.layers[layer].values))
        expected = scaled_dot_product_attention(query, *held, scale=scale).transpose(1, 2)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@native
def test_layers_that_began_alike_may_differ_afterwards() -> None:
    """What the first layer was found to hold is the next one's own: nothing of it is shared."""
    cache = cache_of("int8")
    feed(cache, 2, 5)
    cache.layers[0].reset()
    cache.update(new_tokens(1, 3), new_tokens(1, 3), 0)
    assert [layer.batch for layer in cache.layers] == [1, 2, 2]
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 5, 5]


@pytest.mark.parametrize("kv", ["none", "int8+window:6+sinks:2", "int4+window:5", "paged"])
def test_generation_is_the_same_with_native_kernels_and_without(kv: str, request: pytest.FixtureRequest) -> None:
    model = llama(num_hidden_layers=LAYERS).eval()
    inputs = prompt(2, 9, padding=3)

    def generated() -> torch.Tensor:
        with hfkv.patch(model, kv):
            return model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)

    ours = generated()
    request.getfixturevalue("without_native")
    assert torch.equal(ours, generated())
