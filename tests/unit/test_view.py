"""KVView: an ordinary tensor to everyone, never silently wrong."""

import pytest
import torch

import hfkv
from hfkv.layer import KVLayer
from hfkv.view import KVView
from tests.tiny import greedy, llama, llama_config, prompt


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


@pytest.mark.parametrize(
    "write", [lambda key: key.add_(1), lambda key: key.zero_(), lambda key: torch.add(key, 1, out=key)]
)
def test_writing_to_a_view_raises(write) -> None:
    _, key, _ = views()
    with pytest.raises(RuntimeError, match="would be lost"):
        write(key)


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
