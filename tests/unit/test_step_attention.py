"""Attention in a `Step`: what few tokens are attended to by, what a query sees, and how few calls it takes."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import hfkv
from hfkv import KVCache
from hfkv.attention.function import hfkv_attention
from hfkv.attention.masks import hfkv_mask
from hfkv.cache.layers.following import Following
from tests.tiny import llama, prompt
from tests.unit.test_step import KINDS, LAYERS, cache_of


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("without_native")
def test_attention_to_few_tokens_is_that_of_the_kernel(kv: str, dtype: torch.dtype) -> None:
    cache, query = cache_of(kv), torch.randn(2, 4, 1, 16).to(dtype)
    module = llama(num_hidden_layers=1).model.layers[0].self_attn
    states = torch.randn(2, 2, 13, 16).to(dtype), torch.randn(2, 2, 13, 16).to(dtype)
    cache.update(*states, 0)
    for _ in range(9):
        new = torch.randn(2, 2, 1, 16).to(dtype), torch.randn(2, 2, 1, 16).to(dtype)
        key, value = cache.update(*new, 0)
        assert key.held.step.is_short
        short = hfkv_attention(module, query, key, value, None, scaling=0.25)[0]
        key.held.step = None
        long = hfkv_attention(module, query, key, value, None, scaling=0.25)[0]
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(short, long, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("pads", [None, (0, 2)])
def test_several_queries_of_few_tokens_see_what_each_sees_alone(kv: str, pads: tuple[int, ...] | None) -> None:
    module = llama(num_hidden_layers=1).model.layers[0].self_attn
    cache, singly = cache_of(kv), cache_of(kv)
    padding = None
    if pads is not None:
        padding = torch.arange(20) >= torch.tensor(pads)[:, None]
    for tokens in (3, 4, 2, 4, 4):
        states = torch.randn(2, 2, 2, tokens, 16)
        query, seen = torch.randn(2, 4, tokens, 16), cache.get_seq_length() + tokens
        key, value = cache.update(*states, 0)
        mask = hfkv_mask(2, tokens, seen, seen - tokens, attention_mask=padding)
        several = hfkv_attention(module, query, key, value, mask, scaling=0.25)[0]
        assert key.held.step.rule.is_plain
        one_by_one = []
        for t in range(tokens):
            key, value = singly.update(*states[..., t : t + 1, :], 0)
            mask = hfkv_mask(2, 1, seen - tokens + t + 1, seen - tokens + t, attention_mask=padding)
            one_by_one.append(hfkv_attention(module, query[:, :, t : t + 1], key, value, mask, scaling=0.25)[0])
        expected = torch.cat(one_by_one, dim=1)
        real = padding[:, seen - tokens : seen] if padding is not None else torch.ones(2, tokens, dtype=torch.bool)
        torch.testing.assert_close(several[real], expected[real], atol=1e-5, rtol=1e-5)
        assert not several[~real].any()  # pad tokens' queries see nothing


@pytest.mark.parametrize("kv", ["window:6+sinks:2", "int8+window:6+sinks:2"])
@pytest.mark.parametrize("tokens", [4, 20])
def test_several_queries_without_a_mask_are_not_taken_as_causal_under_a_window(kv: str, tokens: int) -> None:
    module, cache = llama(num_hidden_layers=1).model.layers[0].self_attn, cache_of(kv)
    if tokens < 20:
        cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), 0)
    views = cache.update(torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16), 0)
    with pytest.raises(NotImplementedError):
        hfkv_attention(module, torch.randn(1, 4, tokens, 16), *views, None, scaling=0.25, is_causal=False)


def test_a_long_prompt_under_a_window_gets_no_mask_of_its_own() -> None:
    """Masks are written out where few tokens are decoded, which on a GPU is nowhere."""
    module, cache = llama(num_hidden_layers=1).model.layers[0].self_attn, cache_of("window:6+sinks:2")
    with mock.patch.object(Following, "_is_short", return_value=False):
        key, value = cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), 0)
    hfkv_attention(module, torch.randn(1, 4, 20, 16), key, value, hfkv_mask(1, 20, 20, 0), scaling=0.25)
    assert not key.held.step.rule.is_plain


def calls_of_a_step(kv: str) -> float:
    """Python calls of hfkv's own code, a layer, in a decode step."""
    model = llama(num_hidden_layers=8)
    patch = hfkv.patch(model, kv)
    cache, ids = patch.new_cache(), torch.randint(3, 99, (1, 20))
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and ("/hfkv/" in frame.f_code.co_filename or "/patches/" in frame.f_code.co_filename):
            counts[frame.f_code.co_qualname] += 1

    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
        sys.setprofile(count)
        try:
            model(ids[:, :1], past_key_values=cache)
        finally:
            sys.setprofile(None)
    patch.undo()
    return sum(n for n in counts.values() if n >= 8) / 8


def test_a_layer_makes_few_python_calls_in_a_step() -> None:
    assert calls_of_a_step("none") <= 20
    assert calls_of_a_step("paged") <= 30
    assert calls_of_a_step("window:8") <= 20
    assert calls_of_a_step("int8") <= 35


@pytest.mark.usefixtures("without_native")
def test_a_layer_makes_few_python_calls_without_native_kernels() -> None:
    assert calls_of_a_step("int8") <= 35


def test_a_prompt_of_few_tokens_is_attended_to_as_transformers_does() -> None:
    model = llama(num_hidden_layers=LAYERS)
    inputs = prompt(1, 9)
    stock = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
    with hfkv.patch(model, "none"):
        ours = model(**inputs, past_key_values=KVCache(model)).logits
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("kv", ["none", "int8", "none+paged+page_size:16"])
@pytest.mark.parametrize("is_sliced", [False, True])
def test_a_mask_that_is_filled_anew_between_forwards_is_read_anew(kv: str, is_sliced: bool) -> None:
    """Drafts are verified, and taken back, with one buffer for their masks."""
    model, held, tokens = llama(num_hidden_layers=2), 300, 3
    ids, new = torch.randint(3, 99, (1, held)), torch.randint(3, 99, (1, tokens))
    mask = torch.ones(1, 1, tokens, held + tokens + (40 if is_sliced else 0), dtype=torch.bool)[..., : held + tokens]
    places = torch.arange(held, held + tokens)[None]

    def seen(cache: KVCache) -> list[torch.Tensor]:
        torch.manual_seed(1)
        found = []
        model(ids, past_key_values=cache)
        for _ in range(4):
            mask.copy_(torch.rand(mask.shape) > 0.5)
            mask[:, :, 0] = False  # it sees nothing
            found.append(model(new, past_key_values=cache, attention_mask=mask, position_ids=places).logits[:, 1:])
            cache.crop(-tokens)
        return found

    with torch.no_grad():
        expected = seen(KVCache(model, kv))
        with hfkv.patch(model):
            ours = seen(KVCache(model, kv))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
