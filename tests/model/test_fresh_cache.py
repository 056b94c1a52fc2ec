"""A patched model's forwards get hfkv caches as its `generate` does; what gets none is said."""

import inspect
import logging
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Phi3Config,
    Phi3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hfkv
from hfkv.patches.cacheless import cacheless_reason
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED

KVS = ["none", "int8", "int4", "window:6+sinks:2", "int8+window:6+paged"]


@pytest.mark.parametrize("kv", KVS)
def test_a_forward_without_a_cache_gets_one_of_ours(kv: str) -> None:
    model, inputs = llama(), prompt(padding=3)
    with hfkv.patch(model, kv) as handle, torch.no_grad():
        given = model(**inputs, past_key_values=handle.new_cache())
        output = model(**inputs)
        assert type(output.past_key_values) is hfkv.KVCache
        assert output.past_key_values.kv == handle.kv
        assert torch.equal(output.logits, given.logits)
        positional = model(inputs["input_ids"], inputs["attention_mask"])
        assert torch.equal(positional.logits, given.logits)
        # It goes on, and knows its tokens.
        text = torch.cat((inputs["input_ids"], output.logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.ones_like(text)
        mask[:, :-1] = inputs["attention_mask"]
        model.generate(text, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=2)
        with pytest.raises(ValueError, match="the prompt does not continue"):
            model.generate(text + 1, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=2)


def test_a_cache_given_by_position_is_kept() -> None:
    model, ids, cache = llama(), prompt()["input_ids"], DynamicCache()
    with hfkv.patch(model, "int8"), torch.no_grad():
        assert model(ids, None, None, cache).past_key_values is cache


def test_a_decoder_of_an_encoder_gets_one_too() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 99, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids)
        with hfkv.patch(model):
            output = model(input_ids=ids, labels=ids)
    assert isinstance(output.past_key_values, EncoderDecoderCache)
    assert isinstance(output.past_key_values.self_attention_cache, hfkv.KVCache)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "enabled", "reason"),
    [({"use_cache": False}, False, "use_cache=False"), ({}, True, "gradients flow through no hfkv cache")],
)
def test_a_forward_that_gets_no_cache_says_so_once(
    given: dict[str, Any], enabled: bool, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = llama(), prompt()
    for kv, count in (("window:6+sinks:2", 1), ("paged", 0)):
        caplog.clear()
        with hfkv.patch(model, kv), torch.set_grad_enabled(enabled), caplog.at_level(logging.WARNING, "hfkv"):
            for _ in range(2):
                output = model(**inputs, **given)
                assert not isinstance(output.past_key_values, hfkv.KVCache)
        assert [reason in record.message for record in caplog.records] == [True] * count


def test_the_unconditional_half_of_guidance_has_the_cache_of_the_other() -> None:
    model, inputs = llama(), prompt(batch=1)
    seen = []
    with hfkv.patch(model, "int4"):
        model.model.layers[0].self_attn.register_forward_hook(
            lambda _, args, kwargs, output: seen.append(type(kwargs["past_key_values"])), with_kwargs=True
        )
        greedy(model, inputs, 4, guidance_scale=2.0)
    assert len(seen) > 4
    assert set(seen) == {hfkv.KVCache}


@pytest.mark.parametrize("kv", [None, "paged"])
def test_guidance_is_stocks(kv: str | None) -> None:
    model, inputs = llama(), prompt(batch=1)
    given = {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[7, 8, 9]])}
    expected = greedy(model, inputs, **given).tolist()
    with hfkv.patch(model, kv):
        assert greedy(model, inputs, **given).tolist() == expected


def _phi3() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    parameters = {**rope, "original_max_position_embeddings": 32, "factor": 8.0}
    config = Phi3Config(**sizes, **heads, **tokens, original_max_position_embeddings=32, rope_parameters=parameters)
    model = Phi3ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def _reads_anew() -> bool:
    """Whether this transformers reads a text anew when it has dropped its cache; 5.17 does not."""
    return "next_sequence_length" in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation)


@pytest.mark.parametrize("given", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("kv", ["none", "paged", "int8", "int8+window:16+paged"])
def test_a_text_that_crosses_the_length_of_longrope_goes_on_in_our_cache(kv: str, given: dict[str, Any]) -> None:
    model, ids = _phi3(), torch.arange(3, 23)[None]
    options = {
        "max_new_tokens": 20,
        "return_dict_in_generate": True,
        "output_logits": True,
        "do_sample": False,
        **given,
    }
    if not _reads_anew():
        with hfkv.patch(model, kv), pytest.raises(NotImplementedError, match="does not read it anew"):
            model.generate(ids, **options)
        return
    torch.manual_seed(2)
    expected = model.generate(ids, **options)
    with hfkv.patch(model, kv) as handle:
        torch.manual_seed(2)
        output = model.generate(ids, **options)
        cache = output.past_key_values
        assert type(cache) is hfkv.KVCache
        assert cache.kv == handle.kv
        assert cache.get_seq_length() == 39
        if kv in ("none", "paged"):
            assert output.sequences.tolist() == expected.sequences.tolist()
        elif not given:
            # The last step sees what a fresh cache sees of the whole text.
            fresh = model(output.sequences[:, :-1], past_key_values=handle.new_cache()).logits[:, -1]
            torch.testing.assert_close(output.logits[-1], fresh, atol=1e-3, rtol=1e-3)


def test_a_call_with_a_stock_cache_of_ones_own_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = llama(), prompt()
    with hfkv.patch(model, "int8"), caplog.at_level(logging.WARNING, "hfkv"):
        for _ in range(2):
            greedy(model, inputs, 3, past_key_values=DynamicCache(config=model.config))
    assert [record.message for record in caplog.records] == [
        "LlamaForCausalLM was given a DynamicCache: kv has no effect on it"
    ]


@pytest.mark.parametrize("call", ["generate_batch", "paged", "manager"])
def test_continuous_batching_of_a_patched_model_names_the_way_out(call: str) -> None:
    model, ids = llama(), prompt(batch=1)["input_ids"]
    calls = {
        "generate_batch": lambda: model.generate_batch([ids[0].tolist()]),
        "paged": lambda: model.generate(ids, cache_implementation="paged", max_new_tokens=2),
        "manager": lambda: model.init_continuous_batching(),
    }
    with hfkv.patch(model), pytest.raises(NotImplementedError, match=r"hfkv\.unpatch\(model\)"):
        calls[call]()
    assert "init_continuous_batching" not in vars(model)


def test_a_model_that_does_more_than_make_a_cache_makes_its_own(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "lru_width": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 16, "pad_token_id": 0}
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **heads, eos_token_id=None)).eval()
    ids = prompt()["input_ids"]
    with torch.no_grad():
        expected = [model(ids).logits, model(ids[:, -1:]).logits]  # its modules begin anew
        guided = greedy(model, {"input_ids": ids[:1]}, guidance_scale=1.5).tolist()
        with hfkv.patch(model, "int8") as handle, caplog.at_level(logging.WARNING, "hfkv"):
            for given, stock in zip((ids, ids[:, -1:]), expected, strict=True):
                assert torch.equal(model(given).logits, stock)
            assert "does more than make a cache" in str(handle.cacheless_reason)
        with hfkv.patch(model):
            assert greedy(model, {"input_ids": ids[:1]}, guidance_scale=1.5).tolist() == guided
    assert sum("has no effect on a forward: RecurrentGemmaModel does more" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("name", [name for name in NAMED if name != "recurrent_gemma"])
def test_most_models_only_make_a_cache(name: str) -> None:
    assert cacheless_reason(NAMED[name]().model) is None


def test_a_cache_that_an_encoder_decoder_would_misread_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 99, (2, 7))
    expected = greedy(model, {"input_ids": ids}).tolist()
    with hfkv.patch(model) as handle, torch.no_grad():
        for call in (model.generate, lambda ids, **given: model(input_ids=ids, decoder_input_ids=ids, **given)):
            with pytest.raises(ValueError, match=r"EncoderDecoderCache\(cache, DynamicCache"):
                call(ids, past_key_values=handle.new_cache())
        cache = EncoderDecoderCache(handle.new_cache(), DynamicCache(config=model.config))
        assert greedy(model, {"input_ids": ids}, past_key_values=cache).tolist() == expected


def test_an_attention_that_compiles_what_it_is_given_is_refused() -> None:
    model = llama()
    with hfkv.patch(model):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(NotImplementedError, match=r"flex_attention .*set_attn_implementation"):
            greedy(model, prompt())


@pytest.mark.parametrize("name", [name for name in ("qwen3_next", "jamba", "bamba") if name in NAMED])
@pytest.mark.parametrize("indices", [[1], torch.tensor([1, 0, 1]), slice(0, 1)], ids=str)
def test_rows_of_hybrid_models_are_selected_in_all_layers(name: str, indices: Any) -> None:
    model, inputs = NAMED[name]().model, prompt()
    ids = inputs["input_ids"].clamp(max=88)
    with hfkv.patch(model) as handle, torch.no_grad():
        caches = [handle.new_cache(), handle.new_cache()]
        model(ids, past_key_values=caches[0])
        caches[0].batch_select_indices(indices)
        model(ids[indices], past_key_values=caches[1])
        one, other = (model(ids[indices][:, -1:], past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_transformers_builds_no_cache_that_would_be_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = llama(), []
    init = DynamicCache.__init__
    monkeypatch.setattr(
        DynamicCache,
        "__init__",
        lambda self, *given, **named: (made.append(type(self)), init(self, *given, **named))[1],
    )
    with hfkv.patch(model, "int8"):
        for _ in range(2):
            made.clear()
            greedy(model, prompt(), 3)
        assert not made
        # Where transformers makes another one, or none, it is asked.
        for words in ({"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
            output = model.generate(**prompt(), max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True, **words)
            is_ours = isinstance(output.past_key_values, hfkv.KVCache)
            assert is_ours == (words == {"cache_implementation": "dynamic"})


def test_a_config_that_changes_between_calls_is_seen() -> None:
    model, inputs = llama(num_hidden_layers=3), prompt(2, 12)

    def layers() -> list[int | None]:
        cache = model.generate(**inputs, max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True).past_key_values
        return [layer.sliding for layer in cache.layers]

    model.config.layer_types = ["full_attention"] * 3
    with hfkv.patch(model, "int8"):
        assert layers() == layers() == [None] * 3
        model.config.sliding_window = 4
        model.config.layer_types[1] = "sliding_attention"  # in place
        assert layers() == layers() == [None, 4, None]
        model.config.layer_types[1] = "full_attention"
        assert layers() == [None] * 3
