"""Masks under a window: left padding is read however it is written, and anything else is refused."""

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig, Window
from tests.tiny import llama, prompt, text


@pytest.mark.parametrize("kind", ["holes", "bidirectional"])
def test_a_window_refuses_masks_that_are_not_left_padding(kind: str) -> None:
    model, count = llama(), 12
    mask = torch.ones(count, count, dtype=torch.bool)
    if kind == "holes":
        mask = mask.tril()
        mask[6:11, :3] = False
    kv = "window:5+sinks:1"
    with hfkv.patch(model, kv), pytest.raises(NotImplementedError, match="not the causal one of a left-padded batch"):
        model(prompt(1, count)["input_ids"], attention_mask=mask[None, None], past_key_values=KVCache(model, kv))


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("is_additive", [False, True])
@pytest.mark.parametrize("kind", ["packed", "right padding"])
def test_packed_texts_and_right_padding_in_a_4d_mask_are_refused(kind: str, is_additive: bool) -> None:
    model, ids = llama(), text(2, 40)
    mask = causal(40).expand(2, 1, 40, 40).clone()
    if kind == "packed":
        mask[:, :, 16:, :16] = False
    else:
        mask[1, :, 30:], mask[1, :, :, 30:] = False, False
    if is_additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    kv = "window:6+sinks:2"
    with hfkv.patch(model, kv), pytest.raises(NotImplementedError, match="packed texts"):
        model(ids, attention_mask=mask, past_key_values=KVCache(model, kv))


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("size", [6, 100])
def test_an_additive_mask_of_left_padding_is_read_whatever_it_hides_with(size: int, fill: float) -> None:
    model, ids = llama(), text(2, 30)
    real = torch.arange(30) >= torch.tensor([0, 7])[:, None]
    mask = torch.where(causal(30) & real[:, None, None], 0.0, fill)
    mask[1, :, :7] = 0.0 if fill == float("-inf") else mask[1, :, :7]  # a row of -inf is NaN in any model
    kv = KVConfig(window=Window(size, 2))
    with torch.no_grad(), hfkv.patch(model, kv):
        written = model(ids, attention_mask=mask, past_key_values=KVCache(model, kv)).logits
        plain = model(ids, attention_mask=real.long(), past_key_values=KVCache(model, kv)).logits
    torch.testing.assert_close(written[real], plain[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [6, 100])
def test_a_mask_that_says_more_than_what_is_hidden_is_refused(size: int) -> None:
    model, ids = llama(), text(1, 30)
    kv = KVConfig(window=Window(size, 2))
    distance = (torch.arange(30)[:, None] - torch.arange(30)).clamp_min(0)
    bias = torch.where(causal(30), -0.7 * distance, float("-inf"))[None, None]
    with hfkv.patch(model, kv):
        with pytest.raises(NotImplementedError, match="values between 0 and hidden"):
            model(ids, attention_mask=bias, past_key_values=KVCache(model, kv))
        with pytest.raises(TypeError, match="must be bool or additive"):
            model(ids, attention_mask=causal(30).long()[None, None], past_key_values=KVCache(model, kv))
