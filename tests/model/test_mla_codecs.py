"""Latent attention (MLA) over caches of every codec: what stock attention gives over the decoded tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hfkv
from hfkv.attention.latent.crossover import Form, forced
from hfkv.patches.mla import latent_modules
from tests.latent_models import CLOSE, inputs_for, model_of
from tests.zoo import generate, prompt

CODECS = ("int8", "int4", "fp8", "k:int4+v:none")


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("store", ["", "+paged+page_size:4", "+offload"])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_give_what_stock_attention_gives_over_the_decoded_view(codec: str, store: str, form: Form) -> None:
    # The second has no rotary keys at all, and an indexer.
    for model in (model_of("deepseek_v2"), model_of("glm5_next")):
        codec_is_seen_by_both(model, codec + store, form)


def codec_is_seen_by_both(model: Any, kv: str, form: Form) -> None:
    inputs, attention = prompt(model, length=20), latent_modules(model)[0]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def read() -> torch.Tensor:
        """What the first layer of latents says of a prompt and of tokens one by one.

        Its latents are the same to the last bit, whichever attention; those of the next may differ by a code.
        """
        cache, said = hfkv.KVCache(model, kv), []
        hook = attention.register_forward_hook(lambda module, args, output: said.append(output[0]))
        for first, last in ((0, 9), *((at, at + 1) for at in range(9, 20))):
            model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
        hook.remove()
        return torch.cat(said, dim=1)[mask.bool()]

    with torch.no_grad():
        expected = read()
        with hfkv.patch(model, kv), forced(form):
            torch.testing.assert_close(read(), expected, **CLOSE)


@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4"])
def test_the_absorbed_form_needs_no_kernel(kv: str, expansions: Any) -> None:
    model, inputs = copy.deepcopy(model_of("youtu")).double(), inputs_for(model_of("youtu"))
    tokens, logits = generate(model, inputs, past_key_values=hfkv.KVCache(model, kv), max_new_tokens=12)
    count = expansions(model)
    with hfkv.patch(model, kv), forced("absorbed"):
        ours, our_logits = generate(model, inputs, max_new_tokens=12)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, atol=1e-9, rtol=0)
    assert count.tokens == []


def test_an_int8_cache_of_latents_is_half_the_bytes() -> None:
    model = model_of("deepseek_v3")
    inputs, sizes = inputs_for(model), []
    for kv in ("none", "int8"):
        with hfkv.patch(model.to(torch.bfloat16), kv) as handle:
            cache = handle.new_cache()
            generate(model, inputs, past_key_values=cache)
            sizes.append(cache.held_bytes())
    model.float()
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert sizes[1] / sizes[0] == pytest.approx((width + 4) / (2 * width))
