"""patch and unpatch: refusals, undo, and what they leave alone."""

import copy
import io
import logging

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    EncoderDecoderModel,
    MambaConfig,
    MambaForCausalLM,
)

import hfkv
from hfkv import KVConfig
from tests.tiny import greedy, llama, llama_config, prompt
from tests.zoo import NAMED, architectures, build, generate


def state(model: torch.nn.Module) -> list[tuple[str, dict]]:
    return [(name, dict(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bloom", "llava", "qwen3_next"])
def test_undo_is_complete(name: str) -> None:
    sample = NAMED[name]()
    model, inputs = sample.model, sample.inputs
    tokens = generate(model, inputs)
    before = state(model)
    implementation = model.config._attn_implementation
    handle = hfkv.patch(model, "int8")
    generate(model, inputs)
    handle.undo()
    handle.undo()
    after = state(model)
    for (name_before, attributes_before), (name_after, attributes_after) in zip(before, after, strict=True):
        assert name_before == name_after
        assert attributes_before.keys() == attributes_after.keys()
        assert all(attributes_before[key] is attributes_after[key] for key in attributes_before)
    assert model.config._attn_implementation == implementation
    again = generate(model, inputs)
    assert torch.equal(tokens[0], again[0])
    assert torch.equal(tokens[1], again[1])


def test_a_context_manager_undoes_even_after_an_error() -> None:
    model = llama()
    before = state(model)
    with pytest.raises(ZeroDivisionError), hfkv.patch(model):
        raise ZeroDivisionError
    assert [attributes.keys() for _, attributes in state(model)] == [attributes.keys() for _, attributes in before]
    assert model.config._attn_implementation == "sdpa"


def test_patching_twice_says_how_to_undo() -> None:
    model = llama()
    with hfkv.patch(model, "int8"):
        with pytest.raises(RuntimeError, match=r"already patched .*int8.*hfkv.unpatch\(model\)"):
            hfkv.patch(model)
        hfkv.unpatch(model)
        with pytest.raises(RuntimeError, match="not patched"):
            hfkv.unpatch(model)


def test_a_failed_patch_leaves_the_model_as_it_was() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4)).eval()
    before = state(model)
    with pytest.raises(ValueError, match=r"keeps its own attention .* leave the window, or recent, out"):
        hfkv.patch(model, "window:8")
    assert [vars_.keys() for _, vars_ in state(model)] == [vars_.keys() for _, vars_ in before]


def test_a_model_that_keeps_its_attention_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = NAMED["bloom"]().model
    with caplog.at_level(logging.WARNING, "hfkv"), hfkv.patch(model) as handle:
        assert handle.own_attention == "its code does not go through transformers' attention functions"
    assert "BloomForCausalLM keeps its own attention" in caplog.text


def test_layers_left_to_transformers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = NAMED["qwen3_next"]().model
    with caplog.at_level(logging.WARNING, "hfkv"), hfkv.patch(model) as handle:
        assert handle.own_layers == {0: "LinearAttentionLayer"}
    assert "LinearAttentionLayer keep transformers' own cache" in caplog.text


def test_models_without_a_layered_kv_cache_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not use a layered KV cache|no attention heads"):
        hfkv.patch(MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4)))
    with pytest.raises(TypeError, match="has no generate"):
        hfkv.patch(AutoModel.from_config(llama_config()))
    with pytest.raises(TypeError, match="takes a transformers model or a PeftModel, got Linear"):
        hfkv.patch(torch.nn.Linear(2, 2))


def test_an_unknown_keyword_raises() -> None:
    with pytest.raises(TypeError, match="experts"):
        hfkv.patch(llama(), experts="auto")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="unknown word 'int7'"):
        hfkv.patch(llama(), "int7")


def test_a_changed_hook_of_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", lambda self, generation_config: None)
    with pytest.raises(
        NotImplementedError, match=r"_prepare_cache_for_generation takes \['self', 'generation_config'\]"
    ):
        hfkv.patch(model)


def test_another_model_that_shares_the_config_keeps_its_attention() -> None:
    config = llama_config()
    first, second = type(llama())(config), type(llama())(config)
    with hfkv.patch(first):
        assert first.config._attn_implementation == "hfkv"
        assert second.config._attn_implementation == "sdpa"
        assert config._attn_implementation == "sdpa"
    assert first.config is config


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model = llama()
    expected = greedy(model, prompt())
    with hfkv.patch(model, "int8") as handle:
        twin = copy.deepcopy(model)
        assert twin.hfkv is not handle
        assert twin.hfkv.model is twin
        hfkv.unpatch(twin)
        assert twin.config._attn_implementation == "sdpa"
        assert torch.equal(greedy(twin, prompt()), expected)
        assert model.config._attn_implementation == "hfkv"


def test_calls_that_ask_for_something_else_are_left_alone_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    inputs = prompt()
    expected = greedy(model, inputs)
    with hfkv.patch(model, "int4"):
        assert torch.equal(greedy(model, inputs, use_cache=False), expected)
        assert torch.equal(greedy(model, inputs, cache_implementation="static"), expected)
        assert "asked for use_cache=False: hfkv leaves such calls alone" in caplog.text
        assert "asked for cache_implementation='static'" in caplog.text
        own = hfkv.KVCache(model, "none")
        assert torch.equal(greedy(model, inputs, past_key_values=own), expected)
        assert own.get_seq_length() == expected.shape[1] - 1
    caplog.clear()
    with hfkv.patch(llama(), "int8") as other:
        for _ in range(2):
            greedy(other.model, inputs, use_cache=False)
    assert caplog.text.count("hfkv leaves such calls alone") == 1  # to each model's user


def test_every_call_gets_a_fresh_cache() -> None:
    model = llama()
    with hfkv.patch(model):
        first, second = (greedy(model, prompt(), return_dict_in_generate=True).past_key_values for _ in range(2))
    assert first is not second
    assert first.get_seq_length() == second.get_seq_length() == 20


def test_a_patched_model_can_be_saved_whole() -> None:
    model = llama()
    with hfkv.patch(model, "int8"):
        expected, file = greedy(model, prompt()), io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    out = greedy(loaded, prompt(), return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.kv == KVConfig("int8")
    hfkv.unpatch(loaded)
    assert loaded.config._attn_implementation == "sdpa"


def test_undo_keeps_what_the_owner_changed_meanwhile() -> None:
    model = llama()
    config = model.config
    with hfkv.patch(model):
        model.resize_token_embeddings(120)
        model.config.eos_token_id = 5
    assert model.config is config
    assert (config.vocab_size, config.eos_token_id, config._attn_implementation) == (120, 5, "sdpa")
    ids = torch.full((1, 4), 110)
    assert model(ids, labels=ids).loss.isfinite()


def test_a_part_of_a_patched_model_is_not_patched_again() -> None:
    fields = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = BertLMHeadModel(BertConfig(**fields, is_decoder=True, add_cross_attention=True))
    whole = EncoderDecoderModel(encoder=BertModel(BertConfig(**fields)), decoder=decoder).eval()
    own = decoder.config
    for first, second in ((whole, decoder), (decoder, whole)):
        with hfkv.patch(first), pytest.raises(RuntimeError, match="take that patch off first"):
            hfkv.patch(second)
        assert decoder.config is own
        assert own._attn_implementation == "sdpa"


def test_configs_that_refuse_comparison_come_off() -> None:
    found = [architecture for architecture in architectures() if architecture.model_type == "gemma4"]
    if not found:
        pytest.skip("this transformers has no gemma4")
    model = build(found[0])
    before = model.config
    with hfkv.patch(model):
        pass
    assert model.config is before
    hfkv.patch(model)
    hfkv.unpatch(model)
