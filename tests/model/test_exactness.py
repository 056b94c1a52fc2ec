"""Lossless is lossless: the tokens of DynamicCache, on every named architecture, attention and generation mode."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
)

import hfkv
from hfkv import KVCache, KVConfig
from hfkv.cache.layers.layer import KVLayer
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED, Sample, generate

LOSSLESS = ("none", "paged+page_size:4", "offload", "offload+paged+page_size:4")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prefill": {"prefill_chunk_size": 4},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
}
# Assisted decoding and prompt lookup take one row; a mask is not the matter there.
ONE_ROW = ("prompt_lookup", "assisted")


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return {}


def sample(samples: dict[str, Sample], name: str) -> Sample:
    if name not in samples:
        samples[name] = NAMED[name]()
        if name == "gemma2":  # the sdpa attention of transformers 5.17 drops its softcap without a word
            samples[name].model.set_attn_implementation("eager")
    return samples[name]


def explicit(model: Any, kv: str) -> Any:
    cache = hfkv.KVCache(model, kv)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config))
    return cache


def outcome(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[str, Any]:
    """The tokens, or the kind of error where the model cannot run that mode: the same is asked of both."""
    torch.manual_seed(7)
    try:
        return "tokens", generate(model, inputs, **options)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        return "error", f"{type(error).__name__}: {error}"


def one_row(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[1:] if value.shape[0] == 2 else value for name, value in inputs.items()}


def assert_same(stock: tuple[str, Any], ours: tuple[str, Any]) -> None:
    assert stock[0] == ours[0], f"stock: {stock[1] if stock[0] == 'error' else 'tokens'}, hfkv: {ours[1]}"
    if stock[0] == "error":
        assert stock[1].split("\n")[0] == ours[1].split("\n")[0]
        return
    assert torch.equal(stock[1][0], ours[1][0])
    torch.testing.assert_close(ours[1][1], stock[1][1], atol=2e-4, rtol=2e-4)


@pytest.mark.pairwise
@pytest.mark.smoke
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMED)
def test_the_decoded_view_is_bit_equal_under_stock_attention(
    samples: dict[str, Sample], name: str, attention: str
) -> None:
    model, inputs = sample(samples, name).model, sample(samples, name).inputs
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{name} has no {attention} attention")
    try:
        expected, logits = generate(model, inputs)
        for kv in LOSSLESS:
            tokens, ours = generate(model, inputs, past_key_values=explicit(model, kv))
            assert torch.equal(tokens, expected)
            assert torch.equal(ours, logits), f"{kv}: logits differ by {(ours - logits).abs().max()}"
    finally:
        model.set_attn_implementation(before)


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMED)
def test_every_generation_mode_gives_the_same_tokens(samples: dict[str, Sample], name: str, mode: str) -> None:
    model, inputs = sample(samples, name).model, sample(samples, name).inputs
    if mode in ONE_ROW:
        inputs = one_row(inputs)
    stock = outcome(model, inputs, **MODES[mode])
    for kv in LOSSLESS[:2]:
        with hfkv.patch(model, kv):
            assert_same(stock, outcome(model, inputs, **MODES[mode]))


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMED)
def test_assisted_decoding_gives_the_same_tokens(samples: dict[str, Sample], name: str) -> None:
    model, inputs = sample(samples, name).model, one_row(sample(samples, name).inputs)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight += 0.02 * torch.randn_like(weight)
    options = {"assistant_model": assistant, "max_new_tokens": 10}
    stock = outcome(model, inputs, **options)
    with hfkv.patch(model), hfkv.patch(assistant):
        assert_same(stock, outcome(model, inputs, **options))


@pytest.mark.parametrize("name", NAMED)
def test_a_second_turn_continues_the_cache(samples: dict[str, Sample], name: str) -> None:
    model, inputs = sample(samples, name).model, sample(samples, name).inputs
    if model.config.is_encoder_decoder or "pixel_values" in inputs:
        pytest.skip("no second turn of text alone")
    turns: list[tuple[str, Any]] = []
    for kv in (None, *LOSSLESS):
        with hfkv.patch(model, kv) if kv is not None else torch.no_grad():
            cache = DynamicCache(config=model.config) if kv is None else hfkv.KVCache(model, kv)
            first, _ = generate(model, inputs, past_key_values=cache)
            more = torch.randint(5, 80, (2, 4), generator=torch.Generator().manual_seed(3))
            ids = torch.cat((first, more), dim=1)
            mask = torch.cat((inputs["attention_mask"], torch.ones(2, ids.shape[1] - 9, dtype=torch.long)), dim=1)
            turns.append(outcome(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache))
    for ours in turns[1:]:
        assert_same(turns[0], ours)


@pytest.mark.parametrize("name", NAMED)
def test_the_cache_in_use_is_ours(samples: dict[str, Sample], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sample(samples, name).model, sample(samples, name).inputs
    updated = set()
    update = KVLayer.update
    monkeypatch.setattr(KVLayer, "update", lambda self, *args, **kw: updated.add(id(self)) or update(self, *args, **kw))
    with hfkv.patch(model) as handle:
        generate(model, inputs, max_new_tokens=2)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    assert len(updated) == num_layers - len(handle.own_layers) > 0


@pytest.mark.parametrize("name", NAMED)
def test_a_padded_row_is_the_row_alone(samples: dict[str, Sample], name: str) -> None:
    model, inputs = sample(samples, name).model, sample(samples, name).inputs
    if "attention_mask" not in inputs or model.config.is_encoder_decoder or "pixel_values" in inputs:
        pytest.skip("no left padding")
    alone = {key: value[:1, 3:] for key, value in inputs.items()}
    stock = torch.equal(generate(model, inputs)[0][:1, 9:], generate(model, alone)[0][:, 6:])
    with hfkv.patch(model):
        padded, single = generate(model, inputs)[0], generate(model, alone)[0]
    # Some models (capacity experts, absolute positions without position ids) differ in stock code too.
    assert torch.equal(padded[:1, 9:], single[:, 6:]) == stock


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5", "mistral", "falcon", "bloom", "deepseek_v3"])
def test_attention_weights_are_the_models_own(samples: dict[str, Sample], name: str) -> None:
    model, inputs = sample(samples, name).model, sample(samples, name).inputs
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 3, "do_sample": False}
    field = "decoder_attentions" if model.config.is_encoder_decoder else "attentions"
    stock = getattr(model.generate(**inputs, **options), field)
    model.set_attn_implementation(before)
    with hfkv.patch(model) as handle:
        if handle.own_attention is None:
            ours = getattr(model.generate(**inputs, **options), field)
            for step_stock, step_ours in zip(stock, ours, strict=True):
                for layer_stock, layer_ours in zip(step_stock, step_ours, strict=True):
                    torch.testing.assert_close(layer_ours, layer_stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss", "mistral"])
def test_half_precision_errs_at_most_twice_as_much_as_stock(name: str, dtype: torch.dtype) -> None:
    found = NAMED[name]()
    model, inputs = found.model, found.inputs
    exact = model(**inputs).logits
    model.to(dtype)
    stock = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
    real = inputs["attention_mask"].bool()
    errors = []
    with hfkv.patch(model):
        for kv in LOSSLESS:
            ours = model(**inputs, past_key_values=hfkv.KVCache(model, kv)).logits
            errors.append((ours - exact)[real].abs().max().item())
    limit = 2 * (stock - exact)[real].abs().max().item()
    assert limit > 0
    assert max(errors) <= limit


def test_an_assistant_that_exits_early_under_overrides() -> None:
    model = llama(num_hidden_layers=4)
    kv = KVConfig(layers={"0": KVConfig(), "1-3": KVConfig(store="paged", page_size=4)})
    expected = greedy(model, prompt(batch=1))
    with hfkv.patch(model, kv):
        assert torch.equal(greedy(model, prompt(batch=1), assistant_early_exit=2), expected)


def test_an_explicit_cache_of_a_model_that_shares_layers_fits() -> None:
    model = llama()
    stock = DynamicCache(config=model.config)
    with hfkv.patch(model):
        cache = KVCache(model)
        assert len(cache.layers) == len(stock.layers)
        greedy(model, prompt(), past_key_values=cache)
