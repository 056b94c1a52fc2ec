"""KVView: an ordinary tensor to everyone, never silently wrong."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hfkv
from hfkv import KVCache
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.view import KVView
from tests.tiny import feed, greedy, llama, llama_config, prompt, states


def views(kv: str = "none", tokens: int = 7, **options: object) -> tuple[KVLayer, torch.Tensor, torch.Tensor]:
    layer = KVLayer(hfkv.KVConfig.parse(kv), **options)  # type: ignore[arg-type]
    key, value = layer.update(torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16))
    return layer, key, value


@pytest.mark.parametrize("kv", ["none", "int8", "int4+paged+page_size:4", "fp8+offload"])
def test_every_operation_sees_the_decoded_tensor(kv: str) -> None:
    layer, key, _ = views(kv)
    plain = layer.keys
    assert isinstance(key, KVView)
    assert not isinstance(plain, KVView)
    assert key.shape == plain.shape
    assert torch.equal(key + 0, plain)
    assert torch.equal(key[:, :, 2:5], plain[:, :, 2:5])
    assert torch.equal(torch.cat((key, key), dim=1), torch.cat((plain, plain), dim=1))
    assert torch.equal(key.transpose(1, 2).contiguous(), plain.transpose(1, 2))
    query = torch.randn(2, 2, 3, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attention(query, key, key), attention(query, plain, plain))


def test_a_plain_view_is_read_without_a_copy() -> None:
    layer, key, _ = views()
    assert (key[:, :, 1:]).data_ptr() == layer.store.planes[0][:, :, 1:].data_ptr()


def test_a_views_length_is_fixed_when_it_is_made() -> None:
    layer, key, _ = views(tokens=7)
    before = key.clone()
    layer.update(torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16))
    assert key.shape[2] == 7
    assert torch.equal(key.clone(), before)


def test_a_stale_view_raises() -> None:
    layer, key, _ = views()
    layer.crop(-2)
    with pytest.raises(RuntimeError, match="stale"):
        key.clone()


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "slice assigned": lambda states: states.__setitem__((slice(None), slice(None), slice(1, 3)), 0),
    "mask assigned": lambda states: states.__setitem__(states > 0, 0),
    "mul_": lambda states: states.mul_(2),
    "+=": lambda states: states.__iadd__(1),
    "zero_ of a slice": lambda states: states[:, :, 1:3].zero_(),
    "copy_ to a row": lambda states: states[0].copy_(torch.ones(2, 7, 16)),
    "fill_ of a transpose": lambda states: states.transpose(1, 2).fill_(3),
    "masked_fill_": lambda states: states.masked_fill_(states > 0, 0),
    "index_put_": lambda states: states.index_put_((torch.tensor([0]),), torch.tensor(1.0)),
    "index_fill_ of a view": lambda states: states.view(2, 2, -1).index_fill_(0, torch.tensor([1]), 0),
    "scatter_": lambda states: states.scatter_(2, torch.zeros(2, 2, 1, 16, dtype=torch.long), 0.5),
    "out": lambda states: torch.mul(states, 2, out=states),
    "out, of a part": lambda states: torch.mul(states[1], 2, out=states.unbind(0)[1]),
    "split": lambda states: states.split(3, dim=2)[1].zero_(),
    "detach": lambda states: states.detach().zero_(),
    "data": lambda states: states.data.zero_(),
    "data assigned": lambda states: setattr(states, "data", torch.zeros(2, 2, 7, 16)),
    "a dtype": lambda states: states.view(torch.int32).zero_(),
    "of a list": lambda states: torch._foreach_mul_([states], 2),
    "init": lambda states: torch.nn.init.zeros_(states),
    "in place": lambda states: torch.nn.functional.relu(states, inplace=True),
    "contiguous": lambda states: states.contiguous().zero_(),
    "numpy": lambda states: states.numpy().__setitem__(0, 0),
    "array": lambda states: np.asarray(states).__setitem__(0, 0),
    "dlpack": lambda states: torch.from_dlpack(states).zero_(),
}


@pytest.mark.parametrize("kv", ["none", "int8", "none+paged", "int4+offload", "none+window:100"])
def test_an_edit_takes_effect_or_raises(kv: str) -> None:
    def routes(layer: KVLayer, view: torch.Tensor) -> dict[str, torch.Tensor | None]:
        cache = hfkv.KVCache(llama_config(num_hidden_layers=1), kv)
        cache.layers[0] = layer
        return {"keys": layer.keys, "of the cache": next(iter(cache))[0], "view": view}

    for name, write in WRITES.items():
        for route in ("keys", "of the cache", "view"):
            layer, key, _ = views(kv)
            before = layer.keys.clone()
            try:
                write(routes(layer, key)[route])
            except (RuntimeError, ValueError):
                assert torch.equal(layer.keys, before), f"{name} of {route}: raised, and changed something"
            else:
                assert not torch.equal(layer.keys, before), f"{name} of {route}: lost"
                assert route == "view", "what is kept is a copy"


def test_what_an_edit_raises_says_how_to_edit() -> None:
    layer, key, _ = views("int8")
    for read in (layer.values, layer.values[0], key):
        with pytest.raises(RuntimeError, match=r"would be lost. Edit a clone and assign it .* layer.values = values"):
            read.zero_()
    values = layer.values.clone()
    values[:, :, 1:3] = 0
    keys = layer.keys.clone()
    layer.values = values
    assert not layer.values[:, :, 1:3].any()
    torch.testing.assert_close(layer.keys, keys, rtol=0.01, atol=0.01)


def test_what_is_read_from_a_layer_is_a_tensor_of_its_own() -> None:
    layer, _, _ = views("int8")
    keys, plain = layer.keys, layer.keys.clone()
    assert type(plain) is type(keys + 0) is torch.Tensor
    assert torch.tensor(keys.tolist()).equal(plain)
    for copied in (copy.deepcopy(keys), pickle.loads(pickle.dumps(keys)), torch.tensor(keys.numpy())):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, plain)
    copied.zero_()
    layer.crop(-3)
    layer.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16))
    assert torch.equal(keys, plain)
    assert keys.data_ptr()


def test_a_windowed_view_refuses_foreign_attentions_at_any_length() -> None:
    _, key, _ = views("window:100", tokens=3)
    with pytest.raises(RuntimeError, match=r"hfkv.patch\(model, kv=...\)"):
        key + 0
    model = llama()
    with pytest.raises(RuntimeError, match=r'set_attn_implementation\("hfkv"\)'):
        greedy(model, prompt(), past_key_values=hfkv.KVCache(model, "window:100"))


def test_the_models_own_window_is_no_concern_of_foreign_attentions() -> None:
    _, key, _ = views("int8", tokens=9, sliding=4)
    assert (key + 0).shape[2] == 9


def test_a_forward_with_gradients_runs_and_its_backward_through_the_cache_raises() -> None:
    for attention, kv in (("sdpa", "none"), ("hfkv", "none"), ("hfkv", "window:100")):
        model = llama()
        model.set_attn_implementation(attention)
        inputs = prompt()
        expected = model(**inputs, use_cache=False).logits
        out = model(**inputs, past_key_values=hfkv.KVCache(model, kv))
        torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="gradients do not flow through an hfkv cache"):
            out.logits.sum().backward()


def test_repr_decodes_nothing() -> None:
    _, key, _ = views("window:100")
    assert repr(key) == "KVView(key, shape=(2, 2, 7, 16), dtype=torch.float32, device=cpu)"
    assert "KVLayer(int8" in repr(hfkv.KVCache(llama_config(), "int8"))


@pytest.mark.parametrize("kv", ["none", "none+paged", "none+offload", "int8", "window:5"])
def test_items_of_a_view_cannot_be_set(kv: str) -> None:
    key, _ = KVCache(llama_config(), kv).update(states(), states(), 0)
    with pytest.raises(RuntimeError, match="would be lost"):
        key[:, :, 0] = 7.0
    for method in ("share_memory_", "apply_"):
        with pytest.raises(RuntimeError, match="would be lost"):
            getattr(key, method)(abs)


def test_a_view_can_leave_as_a_plain_tensor() -> None:
    key, _ = KVCache(llama_config(), "int8").update(states(), states(), 0)
    assert isinstance(key, KVView)
    file = io.BytesIO()
    torch.save(key, file)
    file.seek(0)
    for plain in (torch.load(file), torch.from_numpy(key.numpy()), torch.tensor(key.tolist())):
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, key + 0)


@pytest.mark.parametrize("kv", ["none", "none+window:6+sinks:2"])
def test_keys_that_were_read_do_not_change_with_the_cache(kv: str) -> None:
    cache = KVCache(llama_config(), kv)
    feed(cache, 1, 5)
    feed(cache, 1, 1)
    kept = cache.layers[0].keys
    before = kept.clone()
    cache.crop(-1)
    for _ in range(9):
        feed(cache, 1, 1)
    assert torch.equal(kept, before)
