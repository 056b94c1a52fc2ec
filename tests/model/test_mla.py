"""Latent attention (MLA): every family decodes in the latent space and gives what stock transformers gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hfkv
from hfkv.attention.latent.crossover import Form, forced
from tests.latent_models import CLOSE, FAMILIES, SPARSE, inputs_for, model_of
from tests.zoo import generate, prompt

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("mode", [pytest.param("greedy", marks=pytest.mark.smoke), *list(MODES)[1:]])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_stock_tokens_and_logits(family: str, mode: str, expansions: Any) -> None:
    model = model_of(family)
    if mode == "prompt lookup" and model._is_stateful:
        pytest.skip("transformers assists no model with linear attention")
    inputs, options = inputs_for(model, mode), MODES[mode]
    torch.manual_seed(0)
    tokens, logits = generate(model, inputs, **options)
    with hfkv.patch(model) as handle:
        assert handle.num_latent_layers > 0
        count = expansions(model)
        torch.manual_seed(0)
        ours, our_logits = generate(model, inputs, **options)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, **CLOSE)
    assert count.tokens == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_assists_and_is_assisted(family: str) -> None:
    model = model_of(family)
    if model._is_stateful:
        pytest.skip("transformers assists no model with linear attention")
    inputs, assistant = inputs_for(model, "assisted"), copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight += 0.02 * torch.randn_like(weight)
    tokens, _ = generate(model, inputs, assistant_model=assistant, max_new_tokens=10)
    with hfkv.patch(model), hfkv.patch(assistant):
        ours, _ = generate(model, inputs, assistant_model=assistant, max_new_tokens=10)
    assert torch.equal(ours, tokens)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("family", SPARSE)
def test_what_an_indexer_picks_of_a_long_text_is_all_that_is_seen(family: str, form: Form) -> None:
    model = model_of(family)
    inputs = {name: states for name, states in prompt(model, length=44).items() if name != "pixel_values"}
    tokens, logits = generate(model, inputs)
    with hfkv.patch(model), forced(form):
        ours, our_logits = generate(model, inputs)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, **CLOSE)
    indexers = [module for module in model.modules() if hasattr(module, "index_topk")]
    few = indexers[0].index_topk
    try:
        for indexer in indexers:
            indexer.index_topk = 64
        assert (generate(model, inputs)[1] - logits).abs().max() > 1e-2
    finally:
        for indexer in indexers:
            indexer.index_topk = few


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("kv", ["none", "none+paged+page_size:4", "none+offload"])
def test_both_forms_are_exact(kv: str, form: Form) -> None:
    model = model_of("deepseek_v3")
    inputs = inputs_for(model)
    tokens, logits = generate(model, inputs, max_new_tokens=12)
    with hfkv.patch(model, kv), forced(form):
        ours, our_logits = generate(model, inputs, max_new_tokens=12)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_half_precision_errs_at_most_twice_as_much_as_stock(family: str, dtype: torch.dtype) -> None:
    exact = copy.deepcopy(model_of(family))
    model = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict({name: state.float() for name, state in model.state_dict().items()})
    for module in (*exact.modules(), *model.modules()):
        if hasattr(module, "n_group"):
            module.top_k = getattr(module, "n_routed_experts", 4)  # a router that flips is no error of attention
    ids = torch.randint(5, 80, (2, 24), generator=torch.Generator().manual_seed(3))

    def errors(model: Any, kv: str | None) -> torch.Tensor:
        with torch.no_grad():
            cache = hfkv.KVCache(model, kv) if kv else None
            first = model(ids[:, :12], past_key_values=cache, use_cache=True)
            steps = [first.logits]
            for t in range(12, 24):
                steps.append(model(ids[:, t : t + 1], past_key_values=first.past_key_values).logits)
        return torch.cat(steps, dim=1).float()

    expected = errors(exact, None)
    stock = (errors(model, None) - expected).square().mean().sqrt()
    with hfkv.patch(model):
        ours = (errors(model, "none") - expected).square().mean().sqrt()
    assert ours <= 2 * stock


def test_attention_weights_and_gradients_are_the_models_own() -> None:
    model = model_of("deepseek_v3")
    ids = inputs_for(model)["input_ids"]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, output_attentions=True)
        model.set_attn_implementation("sdpa")
        with hfkv.patch(model) as handle:
            ours = model(ids, output_attentions=True, past_key_values=handle.new_cache())
    for given, wanted in zip(ours.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)
    with hfkv.patch(model) as handle:
        logits = model(ids, past_key_values=handle.new_cache()).logits
        with pytest.raises(RuntimeError, match="gradients do not flow"):
            logits.sum().backward()
        model(ids, use_cache=False).logits.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "kv_b_proj" in name)
    model.zero_grad(set_to_none=True)


def test_undo_copies_and_a_second_model_of_the_same_config() -> None:
    model = model_of("deepseek_v3")
    inputs = inputs_for(model)
    tokens, _ = generate(model, inputs)
    handle = hfkv.patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if "kv_b_proj" in name:
                weight.mul_(-1)
    changed, _ = generate(twin, inputs)
    hfkv.unpatch(twin)
    alone, _ = generate(twin, inputs)
    assert torch.equal(changed, alone)
    assert not torch.equal(changed, tokens)
    handle.undo()
    modules = [module for module in (*model.modules(), *twin.modules()) if "expand_kv" in vars(module)]
    assert modules == []
    assert torch.equal(generate(model, inputs)[0], tokens)


def test_a_changed_method_of_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3")
    (kind,) = {type(module) for module in model.modules() if hasattr(module, "expand_kv")}

    def changed(self: Any, latents: Any) -> Any:
        return latents

    changed.__module__ = kind.__module__
    monkeypatch.setattr(kind, "expand_kv", changed)
    with pytest.raises(NotImplementedError, match=r"expand_kv takes \['self', 'latents'\]"):
        hfkv.patch(model)
    assert "hfkv" not in vars(model)
    assert model.config._attn_implementation != "hfkv"


def test_without_a_patch_the_attention_alone_reads_a_decoded_cache() -> None:
    model = model_of("deepseek_v3")
    inputs = inputs_for(model)
    tokens, _ = generate(model, inputs)
    model.set_attn_implementation("hfkv")
    try:
        assert torch.equal(generate(model, inputs, past_key_values=hfkv.KVCache(model, "none"))[0], tokens)
        with pytest.raises(RuntimeError, match="does not know the window"):
            generate(model, inputs, past_key_values=hfkv.KVCache(model, "window:4"))
    finally:
        model.set_attn_implementation("sdpa")


def test_saved_forked_cropped_and_shared(tmp_path: Any) -> None:
    # In float64: see `llama_for`.
    model = copy.deepcopy(model_of("youtu")).double()
    inputs = {name: states[1:] for name, states in inputs_for(model).items()}
    more = torch.cat((inputs["input_ids"], torch.tensor([[11, 12, 13, 14]])), dim=1)
    for kv in ("none", "int8+paged+page_size:4", "int8+offload"):
        with hfkv.patch(model, kv) as handle:
            cold, _ = generate(model, {"input_ids": more})
            cache = handle.new_cache()
            generate(model, inputs, past_key_values=cache, max_new_tokens=4)
            cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
            cache.save(tmp_path / "cache")
            for continued in (hfkv.KVCache.load(tmp_path / "cache", model), cache.fork(1), cache):
                assert torch.equal(generate(model, {"input_ids": more}, past_key_values=continued)[0], cold)
    for kv in ("none+paged+page_size:4", "int8+paged+page_size:4+offload"):
        with hfkv.patch(model, kv):
            cold, _ = generate(model, {"input_ids": more})
        with hfkv.patch(model, f"{kv}+reuse") as handle:
            generate(model, inputs, max_new_tokens=4)
            assert torch.equal(generate(model, {"input_ids": more})[0], cold)
            assert handle.reuse_stats().hits > 0
