"""Attentions that are set after the patch: by a `generate` of the model's own, by its owner, for weights."""

import copy
from typing import Any

import pytest
import torch

import hfkv
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED

TOKENS = 8
KINDS = [None, "paged+page_size:4", "window:64"]


@pytest.fixture
def whisper() -> Any:
    sample = NAMED["whisper"]()
    settings = {"alignment_heads": [[0, 0], [1, 3]], "no_timestamps_token_id": 80, "median_filter_width": 3}
    for name, value in {**settings, "is_multilingual": False}.items():
        setattr(sample.model.generation_config, name, value)
    return sample


def transcribe(sample: Any, **options: Any) -> Any:
    options = {"do_sample": False, "num_beams": 1, **options}
    features = sample.inputs["input_features"]
    return sample.model.generate(features, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)


def with_times(sample: Any, **options: Any) -> Any:
    return transcribe(sample, return_token_timestamps=True, return_dict_in_generate=True, **options)


def attention_of(model: Any) -> str:
    return model.config._attn_implementation


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("kv", KINDS)
def test_timestamps_of_tokens_leave_the_attention_ours(kv: str | None, options: dict[str, Any], whisper: Any) -> None:
    torch.manual_seed(0)
    stock, before = with_times(whisper, **options), "sdpa"
    assert attention_of(whisper.model) == "eager"  # for good
    whisper.model.set_attn_implementation(before)
    text = transcribe(whisper)
    with hfkv.patch(whisper.model, kv):
        torch.manual_seed(0)
        ours = with_times(whisper, **options)
        assert attention_of(whisper.model) == "hfkv"
        assert torch.equal(ours["sequences"], stock["sequences"])
        torch.testing.assert_close(ours["token_timestamps"], stock["token_timestamps"])
        assert torch.equal(transcribe(whisper), text)
    assert attention_of(whisper.model) == before


def test_a_window_goes_on_behind_timestamps(whisper: Any, caplog: pytest.LogCaptureFixture) -> None:
    with hfkv.patch(whisper.model, "window:4+sinks:1"):
        text = transcribe(whisper)
        for _ in range(2):
            assert torch.equal(with_times(whisper)["sequences"][:, -TOKENS:], text[:, -TOKENS:])
        assert torch.equal(transcribe(whisper), text)
    told = [
        record.message for record in caplog.records if "'eager' in the config, and is 'hfkv' again" in record.message
    ]
    assert len(told) == 1


def test_the_attention_its_owner_chooses_stays() -> None:
    model, inputs = llama(), prompt(2, 9, 3)
    expected = greedy(model, inputs)
    with hfkv.patch(model, "int8") as patch:
        ours = greedy(model, inputs)
        for part in (model, model.model):
            for chosen in ("eager", "sdpa", "hfkv"):
                part.set_attn_implementation(chosen)
                assert patch.attention == chosen
                assert torch.equal(greedy(model, inputs), ours)
                assert attention_of(model) == chosen
        # Not so what is written past it.
        model.config._attn_implementation = "eager"
        assert torch.equal(greedy(model, inputs), ours)
        assert attention_of(model) == "hfkv"
    assert torch.equal(greedy(model, inputs), expected)
    assert "set_attn_implementation" not in {**vars(model), **vars(model.model)}
    assert attention_of(model) == "sdpa"


def test_what_its_owner_chose_stays_behind_the_patch() -> None:
    model = llama()
    with hfkv.patch(model):
        model.set_attn_implementation("eager")
        greedy(model, prompt())
    assert attention_of(model) == "eager"


def test_a_copy_chooses_for_itself() -> None:
    model, inputs = llama(), prompt()
    with hfkv.patch(model) as patch:
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("eager")
        greedy(twin, inputs)
        assert (twin.hfkv.attention, patch.attention) == ("eager", "hfkv")
        assert (attention_of(twin), attention_of(model)) == ("eager", "hfkv")


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_attentions": True, "num_beams": 2}], ids=str)
def test_weights_are_those_of_eager(asked: dict[str, Any]) -> None:
    model, inputs = llama(), prompt(1, 9)
    model.set_attn_implementation("eager")
    stock = greedy(model, inputs, 4, return_dict_in_generate=True, **asked)
    model.set_attn_implementation("sdpa")
    with hfkv.patch(model):
        ours = greedy(model, inputs, 4, return_dict_in_generate=True, **asked)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.attentions, stock.attentions, strict=True):
        for weights, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)


def test_under_a_window_another_attention_is_refused_with_the_way_back() -> None:
    model, inputs = llama(), prompt(1, 20)
    with hfkv.patch(model, "window:8"):
        expected = greedy(model, inputs)
        model.set_attn_implementation("eager")
        with pytest.raises(
            RuntimeError, match=r'another attention was set since, model.set_attn_implementation\("hfkv'
        ):
            greedy(model, inputs)
        model.set_attn_implementation("hfkv")
        assert torch.equal(greedy(model, inputs), expected)
