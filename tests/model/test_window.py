"""Windows and codecs against brute force: the rule on the full sequence, without a cache."""

import pytest
import torch
from torch import nn

import hfkv
from hfkv.codecs import CODECS
from hfkv.config import KVConfig
from tests.tiny import greedy, llama, prompt

SPLITS = {"whole": 40, "chunks": 5, "one by one": 1}


def brute_force(model: nn.Module, ids: torch.Tensor, kv: KVConfig) -> torch.Tensor:
    """Logits of one forward in which attention is written out: codec on every key and value, the rule as a mask."""
    count = ids.shape[1]
    j, t = torch.arange(count)[None, :], torch.arange(count)[:, None]
    visible = j <= t
    if kv.window is not None:
        visible &= (j > t - kv.window.size) | (j < kv.window.sinks)

    def attention(module, query, key, value, mask, scaling, **kwargs):
        codec = CODECS[kv.codec]
        key, value = (codec.decode(codec.encode(x), x.shape[-1], x.dtype) for x in (key, value))
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("brute_force", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("brute_force")
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:4", "paged+page_size:16+offload"])
@pytest.mark.parametrize(
    "rule", ["", "+window:1+sinks:0", "+window:7+sinks:0", "+window:7+sinks:4", "+window:64+sinks:4"]
)
@pytest.mark.parametrize("codec", ["none", "int8", "int4", "fp8"])
def test_logits_equal_brute_force(codec: str, rule: str, store: str, split: str) -> None:
    model = llama()
    ids = prompt(length=40)["input_ids"]
    kv = KVConfig.parse(f"{codec}{rule}+{store}")
    with torch.no_grad():
        expected = brute_force(model, ids, kv)
        with hfkv.patch(model, kv):
            cache = hfkv.KVCache(model, kv)
            ours = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(SPLITS[split], 1)], dim=1)
    # A key rounded the other way, where an upstream layer's sum differs in its last bit, moves a logit by a step.
    tolerance = 1e-4 if codec == "none" else 5e-2
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_rule_makes_a_difference() -> None:
    model = llama()
    ids = prompt(length=40)["input_ids"]
    with torch.no_grad():
        full = brute_force(model, ids, KVConfig())
        for kv in ("window:7+sinks:0", "window:7+sinks:4"):
            assert (brute_force(model, ids, KVConfig.parse(kv)) - full).abs().max() > 0.1 * full.abs().max()


@pytest.mark.parametrize("kv", ["window:8+sinks:2", "int8+window:8+sinks:2+paged+page_size:4"])
def test_windows_under_beams_and_assistants(kv: str) -> None:
    model = llama()
    inputs = prompt(batch=1)
    with hfkv.patch(model, kv):
        plain = greedy(model, inputs, 24)
        assert torch.equal(plain, greedy(model, inputs, 24, prompt_lookup_num_tokens=4))
        assistant = llama(num_hidden_layers=1)
        with hfkv.patch(assistant, kv):
            assert torch.equal(plain, greedy(model, inputs, 24, assistant_model=assistant))
        beams = greedy(model, inputs, 24, num_beams=3)
        assert torch.equal(beams, greedy(model, inputs, 24, num_beams=3, prefill_chunk_size=2))


def test_a_generation_longer_than_the_window_holds_a_constant_number_of_bytes() -> None:
    model = llama()
    with hfkv.patch(model, "window:16+sinks:4"):
        sizes = []
        for new_tokens in (40, 80, 160):
            out = greedy(model, prompt(), new_tokens, return_dict_in_generate=True)
            sizes.append((out.past_key_values.held_bytes(), out.past_key_values.nbytes()))
    assert sizes[0] == sizes[1] == sizes[2]
