"""Padded batches under a window: each row says what it says alone, and padding is not kept."""

from __future__ import annotations

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig, Window
from tests.tiny import greedy, llama, prompt, text
from tests.windowed import RULES


@pytest.mark.parametrize("window", RULES, ids=["plain", "cache", "summary"])
@pytest.mark.parametrize("pads", [(300,), (150, 90), (399, 300)])
def test_prompts_that_are_mostly_padding(pads: tuple[int, ...], window: Window) -> None:
    model, kv = llama(), KVConfig(window=window)
    ids = text(len(pads), 400)
    mask = (torch.arange(400) >= torch.tensor(pads)[:, None]).long()
    with hfkv.patch(model, kv):
        together = greedy(model, {"input_ids": ids, "attention_mask": mask}, 70)
        for row, pad in enumerate(pads):
            alone = {"input_ids": ids[row : row + 1, pad:], "attention_mask": mask[row : row + 1, pad:]}
            assert torch.equal(together[row, pad:], greedy(model, alone, 70)[0])


def test_a_crop_into_the_padding_lets_it_begin_elsewhere() -> None:
    model = llama()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad(), hfkv.patch(model, "window:100"):
        cache = KVCache(model, "window:100")
        model(text(2, 20), attention_mask=mask, past_key_values=cache)
        cache.crop(-15)
        model(text(2, 3), attention_mask=mask[:, :8], past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_one_short_row_does_not_keep_the_padding_of_the_batch() -> None:
    model = llama()
    mask = torch.ones(2, 900, dtype=torch.long)
    mask[1, :890] = 0
    with torch.no_grad(), hfkv.patch(model, "window:64"):
        cache = KVCache(model, "window:64")
        model(text(2, 900), attention_mask=mask, past_key_values=cache)
        model(text(2, 1), attention_mask=torch.cat((mask, mask[:, -1:]), 1), past_key_values=cache)
    assert cache.layers[0].store.length <= 64 + 4


def test_beams_of_a_padded_batch_after_a_crop_keep_their_padding() -> None:
    model, inputs = llama(), prompt(batch=2, length=20, padding=7)
    with hfkv.patch(model, "window:8"):
        expected = greedy(model, inputs, 20, num_beams=2)
        cache = KVCache(model, "window:8")
        found = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False, num_beams=2)
    assert torch.equal(expected, found)


def test_rows_that_are_left_may_have_been_padding_where_the_others_windows_moved() -> None:
    model = llama()
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :25] = 0
    ids = text(2, 31)
    with torch.no_grad(), hfkv.patch(model, "window:10"):
        cache = KVCache(model, "window:10")
        for first in range(30):
            model(ids[:, first : first + 1], attention_mask=mask[:, : first + 1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        ours = model(ids[1:, 30:], attention_mask=mask[1:], past_key_values=cache).logits
        alone = model(ids[1:, 25:], past_key_values=KVCache(model, "window:10")).logits[:, -1:]
    torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-4)
