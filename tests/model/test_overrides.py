"""Methods that a patch replaces: bound methods to whoever looks at them, copies them or wraps them."""

import copy
import functools
import inspect
import io
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import KyutaiSpeechToTextConfig, KyutaiSpeechToTextForConditionalGeneration, LlamaForCausalLM

import hfkv
from tests.tiny import greedy, llama, prompt

REPLACED = ["forward", "_prefill", "_prepare_cache_for_generation", "_get_candidate_generator"]


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_method_looks_like_the_bound_method_it_replaces(name: str) -> None:
    stock, model = llama(), llama()
    hfkv.patch(model)
    ours, expected = getattr(model, name), getattr(stock, name)
    assert isinstance(ours, MethodType)
    assert inspect.ismethod(ours)
    assert ours.__self__ is model
    assert inspect.isfunction(ours.__func__)
    assert (ours.__name__, ours.__qualname__, ours.__doc__) == (
        expected.__name__,
        expected.__qualname__,
        expected.__doc__,
    )
    assert inspect.signature(ours) == inspect.signature(expected)
    assert not hasattr(ours, "__wrapped__")


@pytest.mark.parametrize("name", REPLACED)
def test_what_others_bind_of_it_is_equal_to_it(name: str) -> None:
    model, other = llama(), llama()
    hfkv.patch(model)
    ours = getattr(model, name)
    assert ours == MethodType(ours.__func__, model)
    assert ours != MethodType(ours.__func__, other)
    assert ours != getattr(other, name)
    assert hash(ours) == hash(getattr(model, name))


def test_a_model_binds_our_methods_to_its_codec() -> None:
    torch.manual_seed(0)
    codec = {"model_type": "mimi", "num_quantizers": 8, "audio_channels": 1, "hidden_size": 16, "num_filters": 8}
    codec |= {"num_residual_layers": 1, "upsampling_ratios": [8, 4], "codebook_size": 16, "upsample_groups": 16}
    codec |= {"vector_quantization_hidden_dimension": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    codec |= {"num_key_value_heads": 2, "sliding_window": 4, "codebook_dim": 16, "use_cache": False}
    sizes = {"codebook_vocab_size": 2049, "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 38}
    sizes |= {"num_attention_heads": 4, "sliding_window": 512, "num_codebooks": 8, "frame_size": 64}
    tokens = {"audio_bos_token_id": 2048, "audio_pad_token_id": 2048, "pad_token_id": 0, "bos_token_id": 1}
    config = KyutaiSpeechToTextConfig(**sizes, **tokens, max_position_embeddings=512, codec_config=codec)
    model = KyutaiSpeechToTextForConditionalGeneration(config).eval()
    audio = torch.randn(1, 1, 192)
    expected = model.generate(input_values=audio, max_new_tokens=3).tolist()
    for kv in ("none", "paged"):
        with hfkv.patch(model, kv):
            assert model.generate(input_values=audio, max_new_tokens=3).tolist() == expected


@pytest.mark.parametrize("name", REPLACED)
def test_bound_to_a_model_without_a_patch_it_does_what_the_class_does(name: str) -> None:
    model, other = llama(), llama()
    expected = greedy(other, prompt()).tolist()
    hfkv.patch(model)
    setattr(other, name, MethodType(getattr(model, name).__func__, other))
    assert greedy(other, prompt()).tolist() == expected


def _copied(model: Any) -> Any:
    return copy.deepcopy(model)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [_copied, _pickled, _saved])
@pytest.mark.parametrize("rebound", [False, True])
def test_a_copy_of_a_patched_model_is_patched_by_itself(again: Any, rebound: bool) -> None:
    model = llama()
    hfkv.patch(model, "int8")
    expected = greedy(model, prompt()).tolist()
    if rebound and again is _copied:
        model.forward = MethodType(model.forward.__func__, model)
    twin = again(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # what a copy still had of the model would show
    for name in REPLACED:
        assert getattr(twin, name).__self__ is twin
    output = greedy(twin, prompt(), return_dict_in_generate=True)
    assert output.sequences.tolist() == expected
    assert isinstance(output.past_key_values, hfkv.KVCache)
    assert torch.equal(output.past_key_values.holds_tokens, output.sequences[:, :-1])
    hfkv.unpatch(twin)
    assert not set(vars(twin)) & {*REPLACED, "hfkv"}


def _accelerated(model: Any, keep: bool | None, precision: str) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    prepared = accelerator.prepare(model)
    return prepared if keep is None else accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("keep", [None, True, False], ids=["wrapped", "kept", "unwrapped"])
def test_accelerate_wraps_and_unwraps_a_patched_model(keep: bool | None, precision: str) -> None:
    expected = greedy(_accelerated(llama(), keep, precision), prompt()).tolist()
    model = llama()
    hfkv.patch(model)
    model = _accelerated(model, keep, precision)
    output = greedy(model, prompt(), return_dict_in_generate=True)
    # Under autocast, sdpa and ours round differently.
    is_exact = keep is False or precision == "no"
    assert not is_exact or output.sequences.tolist() == expected
    assert torch.equal(output.past_key_values.holds_tokens, output.sequences[:, :-1])  # it is still written down
    hfkv.unpatch(model)
    after = greedy(model, prompt(), return_dict_in_generate=True)
    assert after.sequences.tolist() == expected
    assert not isinstance(after.past_key_values, hfkv.KVCache)
    hfkv.patch(model, "paged")
    output = greedy(model, prompt(), return_dict_in_generate=True)
    assert not is_exact or output.sequences.tolist() == expected
    assert torch.equal(output.past_key_values.holds_tokens, output.sequences[:, :-1])


def test_a_model_that_accelerate_has_prepared_is_patched_and_unwrapped() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(llama())
    hfkv.patch(model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    output = greedy(model, prompt(), return_dict_in_generate=True)
    assert torch.equal(output.past_key_values.holds_tokens, output.sequences[:, :-1])
    hfkv.unpatch(model)
    assert not isinstance(
        greedy(model, prompt(), return_dict_in_generate=True).past_key_values, type(output.past_key_values)
    )


def _loud(calls: list[str], name: str, inner: Any) -> Any:
    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return inner(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("name", REPLACED[:3])
def test_what_others_wrap_around_ours_outlives_the_patch(name: str) -> None:
    model, calls = llama(), []
    expected = greedy(model, prompt()).tolist()
    hfkv.patch(model, "int4")
    theirs = _loud(calls, name, getattr(model, name))
    setattr(model, name, theirs)
    assert greedy(model, prompt()).tolist() != expected  # int4
    hfkv.unpatch(model)
    assert vars(model)[name] is theirs
    calls.clear()
    assert greedy(model, prompt()).tolist() == expected
    assert calls


def test_a_forward_of_the_instances_own_is_called_and_comes_back() -> None:
    model, calls = llama(), []
    own = _loud(calls, "own", model.forward)
    model.forward = own
    hfkv.patch(model)
    greedy(model, prompt(), 3)
    assert len(calls) == 3
    outer = _loud(calls, "outer", model.forward)
    model.forward = outer
    hfkv.unpatch(model)
    assert model.forward is outer
    calls.clear()
    model(**prompt())
    assert calls == ["outer", "own"]
    assert type(model).forward is LlamaForCausalLM.forward


def test_nothing_is_left_of_two_overrides_of_one_method() -> None:
    model = llama()
    before = set(vars(model))
    for _ in range(2):
        with hfkv.patch(model, graphs=True):
            greedy(model, prompt(), 3)
        assert set(vars(model)) == before


def test_a_patch_on_what_others_have_wrapped_is_not_made_twice() -> None:
    model, calls = llama(), []
    expected = greedy(model, prompt()).tolist()
    for kv in ("none", "paged", "int8+reuse"):
        hfkv.patch(model, kv)
        model.forward = _loud(calls, kv, model.forward)
        output = greedy(model, prompt(), return_dict_in_generate=True)
        assert torch.equal(output.past_key_values.holds_tokens, output.sequences[:, :-1])
        hfkv.unpatch(model)
    assert greedy(model, prompt()).tolist() == expected
