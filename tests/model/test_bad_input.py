"""What a user may get wrong: the right result or a clear error, never wrong text."""

import pytest
import torch
from transformers import DynamicCache

import hfkv
from hfkv.attention.function import hfkv_attention
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED


def test_an_empty_prompt_raises() -> None:
    model = llama()
    with hfkv.patch(model), pytest.raises(ValueError, match="the prompt is empty: give at least one token"):
        greedy(model, {"input_ids": torch.empty(1, 0, dtype=torch.long)}, 5)
    with hfkv.patch(model):
        assert model.generate(max_new_tokens=5, min_new_tokens=5).shape == (1, 6)  # no prompt: from the bos token


@pytest.mark.parametrize("hole", [slice(3, 5), slice(-2, None)], ids=["gap", "right padding"])
@pytest.mark.parametrize("kv", ["none", "int8", "paged+page_size:4"])
def test_a_mask_that_is_not_left_padding_is_obeyed_without_a_window(hole: slice, kv: str) -> None:
    model, inputs = llama(), prompt()
    inputs["attention_mask"][0, hole] = 0
    stock = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
    with hfkv.patch(model, kv):
        ours = model(**inputs, past_key_values=hfkv.KVCache(model, kv)).logits
    torch.testing.assert_close(ours, stock, atol=1e-4 if kv != "int8" else 0.2, rtol=1e-4)
    inputs["attention_mask"][:] = 1
    assert not torch.allclose(model(**inputs).logits, stock, atol=0.5), "the mask makes no difference here"


@pytest.mark.parametrize("hidden", [slice(3, 5), slice(-1, None)], ids=["gap", "right padding"])
def test_a_window_with_hidden_tokens_raises(hidden: slice) -> None:
    model, inputs = llama(), prompt()
    inputs["attention_mask"][0, hidden] = 0
    for length in ("window:6+sinks:2", "window:100"):
        with (
            hfkv.patch(model, length),
            pytest.raises(NotImplementedError, match="not the causal one of a left-padded batch"),
        ):
            greedy(model, inputs)


def test_a_window_obeys_no_mask_of_another_length() -> None:
    model, inputs = llama(), prompt()
    wrong = torch.ones(2, 1, 9, 5, dtype=torch.bool)
    with hfkv.patch(model, "window:6"), pytest.raises(ValueError, match="the mask covers 5 tokens"):
        model(inputs["input_ids"], attention_mask=wrong, past_key_values=hfkv.KVCache(model, "window:6"))


def test_an_unknown_attention_keyword_raises() -> None:
    module = llama().model.layers[0].self_attn
    states = torch.randn(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="does not implement 'block_indices', which LlamaAttention passed"):
        hfkv_attention(module, torch.randn(1, 4, 3, 16), states, states, None, block_indices=torch.zeros(1))
    hfkv_attention(module, torch.randn(1, 4, 3, 16), states, states, None, block_indices=None)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_loading_a_model_that_cannot_take_the_attention_raises(name: str) -> None:
    sample = NAMED[name]()

    def load_and_generate() -> None:
        twin = type(sample.model)._from_config(sample.model.config, attn_implementation="hfkv")
        twin.generate(**sample.inputs, max_new_tokens=2)

    with pytest.raises((ValueError, KeyError), match="hfkv"):
        load_and_generate()


@pytest.mark.parametrize("kv", ["none", "none+paged+page_size:4", "offload"])
def test_nan_keys_give_nan_where_stock_code_does(kv: str) -> None:
    model, inputs = llama(), prompt()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            stock = model(**inputs).logits.isnan()
            assert attention == "sdpa" or bool(stock.any())  # some CPU kernels of sdpa lose NaN
            assert torch.equal(model(**inputs, past_key_values=hfkv.KVCache(model, kv)).logits.isnan(), stock)
        with hfkv.patch(model, kv):
            assert torch.equal(model(**inputs, past_key_values=hfkv.KVCache(model, kv)).logits.isnan(), stock)
