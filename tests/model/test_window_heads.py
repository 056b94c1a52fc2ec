"""Global heads of layers with several of each kind, against brute force: every head holds and sees its own tokens."""

from __future__ import annotations

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig, Window
from tests import brute_force
from tests.tiny import llama, prompt

LENGTH = 24


@pytest.mark.parametrize("store", ["contiguous", "paged"])
@pytest.mark.parametrize("heads", [(1, 3), (3,), (0, 2, 3)])
def test_several_heads_keep_everything_while_several_slide(heads: tuple[int, ...], store: str) -> None:
    model = llama(num_attention_heads=8, num_key_value_heads=4)
    ids = prompt(batch=1, length=LENGTH)["input_ids"]
    kv = KVConfig(window=Window(5, 2, global_heads={1: heads}), store=store)
    with torch.no_grad():
        expected = brute_force.logits(model, ids, kv)
        with hfkv.patch(model, kv):
            cache = KVCache(model, kv)
            parts = [model(part, past_key_values=cache).logits for part in ids.split((15, 1, 8), dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-5 * expected.abs().max()
