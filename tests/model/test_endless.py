"""Text far longer than the bundled model was trained on, through a window of 512."""

from __future__ import annotations

import pytest
import torch

import hfkv
from hfkv import tiny_lm
from hfkv.eval import compare, held_out_loss

WINDOW = "window:512+sinks:4+sink_positions:cache"


@pytest.mark.slow
def test_the_loss_of_a_long_text_stays_near_the_full_caches_at_1k() -> None:
    model, tokenizer = tiny_lm.load()
    ids = tokenizer(tiny_lm.held_out_text(), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    ids = ids[:50_000]
    full = held_out_loss(model, ids, context=1024)
    inputs = torch.cat((torch.tensor([model.config.bos_token_id]), ids))
    nats = 0.0
    with torch.inference_mode(), hfkv.patch(model, WINDOW) as patch:
        cache = hfkv.KVCache(model, WINDOW, patch.rotary)
        for first in range(0, len(ids), 500):
            logits = model(inputs[None, first : first + 500], past_key_values=cache).logits[0].float()
            targets = inputs[first + 1 : first + 501]
            nats += torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum").item()
    assert nats / len(ids) <= 1.15 * full.nats


@pytest.mark.slow
def test_a_generation_of_thousands_of_tokens_takes_the_same_bytes_at_every_step() -> None:
    model, tokenizer = tiny_lm.load()
    inputs = tokenizer("def parse(", return_tensors="pt")
    sizes = set()
    with torch.inference_mode(), hfkv.patch(model, WINDOW) as patch:
        cache = hfkv.KVCache(model, WINDOW, patch.rotary)
        ids = inputs["input_ids"]
        for step in range(6000):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            if step > 600:
                sizes.add(cache.nbytes())
    assert len(sizes) == 1  # what a step computes: test_window_cost.py


@pytest.mark.slow
def test_a_pass_key_is_found_inside_the_window_and_lost_outside() -> None:
    from hfkv.eval import pass_key_grid

    model, tokenizer = tiny_lm.load()
    text = tiny_lm.held_out_text()
    near, far = 0.9, 0.2  # of 1,024 tokens: about 100 and 820 before the question
    found = pass_key_grid(model, tokenizer, text, lengths=[1024], depths=[near, far], trials=20, kv="window:512")
    assert found[0, 0] >= 0.95
    assert found[1, 0] == 0


def test_a_global_layer_keeps_what_the_others_lose() -> None:
    model, _ = tiny_lm.load()
    ids = torch.randint(32, 127, (1500,), generator=torch.Generator().manual_seed(0))
    full, window, with_global = compare(model, ids, ["window:64", "window:64+global_layers:1.2"], context=None)
    assert window.held_bytes < 0.06 * full.held_bytes
    assert 0.5 * full.held_bytes < with_global.held_bytes < 0.56 * full.held_bytes
    assert with_global.kl < window.kl
