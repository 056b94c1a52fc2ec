"""One row of a prompt read for all its copies: by models that keep all in the cache, and by no other."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

import hfkv
from hfkv.cache.selection import choose_rows, repeated
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED, architectures, build, generate
from tests.zoo import prompt as prompt_for

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beam_sample": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "samples": {"num_return_sequences": 2, "do_sample": True},
}


def of_type(model_type: str) -> Any:
    found = [each for each in architectures() if each.model_type == model_type]
    if not found:
        pytest.skip(f"this transformers has no {model_type}")
    return build(found[0])


def run(model: Any, inputs: dict[str, torch.Tensor], mode: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return generate(model, inputs, **MODES[mode], **options)


# State in modules: what a decoder layer keeps of a forward, and gives to the next.


def keep_attribute(module: Any, state: torch.Tensor) -> torch.Tensor | None:
    before, module.state = getattr(module, "state", None), state
    return before


def keep_in_dict(module: Any, state: torch.Tensor) -> torch.Tensor | None:
    before = module.states.get("last")
    module.states["last"] = state
    return before


def keep_in_list(module: Any, state: torch.Tensor) -> torch.Tensor | None:
    module.states.append(state)
    return module.states[-2] if len(module.states) > 1 else None


def keep_in_object(module: Any, state: torch.Tensor) -> torch.Tensor | None:
    before, module.states.last = module.states.last, state
    return before


def keep_in_buffer(module: Any, state: torch.Tensor) -> torch.Tensor | None:
    before = module.states[: len(state)].clone()
    module.states[: len(state)] = state
    return before


def keep_in_cache(module: Any, state: torch.Tensor) -> torch.Tensor | None:
    keys = module.states.update(state[:, None, None], state[:, None, None], 0)[0]
    return keys[:, 0, -2] if keys.shape[2] > 1 else None


KEEPERS: dict[str, tuple[Any, Any]] = {
    "attribute": (keep_attribute, lambda module: setattr(module, "state", None)),
    "dict": (keep_in_dict, lambda module: module.states.clear()),
    "list": (keep_in_list, lambda module: module.states.clear()),
    "deque": (keep_in_list, lambda module: module.states.clear()),
    "object": (keep_in_object, lambda module: setattr(module.states, "last", None)),
    "buffer": (keep_in_buffer, lambda module: module.states.zero_()),
    "cache": (keep_in_cache, lambda module: module.states.layers.clear()),
}
STATES = {
    "dict": dict,
    "list": list,
    "deque": deque,
    "object": lambda: SimpleNamespace(last=None),
    "cache": lambda: DynamicCache(),
}


class Keeping(LlamaForCausalLM):
    """A Llama whose logits depend on the last hidden state of the forward before, too."""

    kind = "attribute"

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        keep, forget = KEEPERS[self.kind]
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            forget(self.lm_head)
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        scores = output.logits[:, -1]
        before = keep(self.lm_head, scores[:, :64])
        if before is not None:
            output.logits = output.logits + before[:, None, :1].tanh() * output.logits.roll(1, -1)
        return output


def keeping(kind: str) -> Any:
    model = llama()
    model.__class__ = Keeping
    model.kind = kind
    if kind == "buffer":
        model.lm_head.register_buffer("states", torch.zeros(8, 64))
    elif kind in STATES:
        model.lm_head.states = STATES[kind]()
    return model


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("kind", KEEPERS)
def test_state_in_modules_is_found_and_its_rows_are_read_one_by_one(
    kind: str, is_inference: bool, rows_read: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode(is_inference):
        model, inputs = keeping(kind), prompt(2, 9, 3)
        stock = {mode: run(model, inputs, mode) for mode in MODES}
        assert not torch.equal(stock["beams"][0], run(llama(), inputs, "beams")[0]), "the state changes nothing"
        with hfkv.patch(model) as patch:
            for mode, copies in (("greedy", 1), ("beams", 3), ("samples", 2), ("beam_sample", 2)):
                rows_read.clear()
                ours, logits = run(model, inputs, mode)
                assert torch.equal(ours, stock[mode][0])
                torch.testing.assert_close(logits, stock[mode][1], atol=1e-4, rtol=1e-4)
                # Once it is known, nothing is read in vain.
                tried = [2] if mode == "beams" else []
                assert [rows for rows, count in rows_read[::2] if count == 9] == [*tried, 2 * copies]
            assert list(patch.reads_once.values()) == [None]
    told = [record.message for record in caplog.records if "row by row" in record.message]
    assert len(told) == 1
    assert "Keeping: beams and samples of a prompt are read row by row: the model keeps state in its modules" in told[0]
    assert "Linear." in told[0]


class KeepingHead(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = super().forward(hidden)
        last = getattr(self, "last", None)
        before = scores[:, -1] if last is None or len(last) != len(scores) else last
        self.last = scores[:, -1]
        return scores + before[:, None].roll(1, -1)


def test_other_adapters_or_modules_are_tried_anew(rows_read: list[tuple[int, int]]) -> None:
    model, inputs = llama(), prompt(2, 9)
    with hfkv.patch(model) as patch:
        run(model, inputs, "beams")
        assert list(patch.reads_once.values()) == [frozenset()]
        model.lm_head.__class__ = KeepingHead
        rows_read.clear()
        ours = run(model, inputs, "beams")[0]
        assert [rows for rows, count in rows_read[::2] if count == 9] == [2, 6]
        assert list(patch.reads_once.values()) == [None]
    del model.lm_head.last
    assert torch.equal(run(model, inputs, "beams")[0], ours)


# More outputs.


class Telling(LlamaForCausalLM):
    """A Llama that returns something of each row in its second dimension, when told to."""

    tells = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.tells:
            output["told"] = output.logits.transpose(0, 1)
        return output


def test_a_model_that_returns_more_is_read_row_by_row(rows_read: list[tuple[int, int]]) -> None:
    model, inputs = llama(), prompt(2, 9, 3)
    stock = run(model, inputs, "beams")[0]
    model.__class__ = Telling
    with hfkv.patch(model):
        assert torch.equal(run(model, inputs, "beams")[0], stock)
        assert [rows for rows, count in rows_read[::2] if count == 9] == [2, 6]
    model.tells = False
    with hfkv.patch(model) as patch:
        for _ in range(2):
            rows_read.clear()
            assert torch.equal(run(model, inputs, "beams")[0], stock)
            assert [rows for rows, count in rows_read[::2] if count == 9] == [2]
        model.tells = True
        cache = patch.new_cache()
        with torch.no_grad():
            model(inputs["input_ids"][:, :6], attention_mask=inputs["attention_mask"][:, :6], past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"the model returns told.*earlier cache.fork"):
            run(model, inputs, "beams", past_key_values=cache)
        assert torch.equal(run(model, inputs, "beams")[0], stock)


def test_a_used_cache_is_tried_on_a_copy(rows_read: list[tuple[int, int]]) -> None:
    inputs = prompt(2, 9)
    expected = greedy(llama(), inputs, num_beams=3)
    for kind, first in ((LlamaForCausalLM, [2]), (Telling, [2, 6])):
        model = llama()
        model.__class__ = kind
        with hfkv.patch(model) as patch:
            cache = patch.new_cache()
            with torch.no_grad():
                model(inputs["input_ids"][:, :6], past_key_values=cache)
            rows_read.clear()
            ours = greedy(model, inputs, num_beams=3, past_key_values=cache)
            assert [rows for rows, count in rows_read[::2] if count == 3] == first
            assert cache.batch_size == 6
            assert cache.get_seq_length() == ours.shape[1] - 1
        assert torch.equal(ours, expected)


def test_hidden_states_come_in_the_dimensions_of_the_model() -> None:
    model, inputs = of_type("gemma3n_text"), prompt(2, 9)
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    stock = greedy(model, inputs, 3, num_beams=2, **options)
    with hfkv.patch(model):
        ours = greedy(model, inputs, 3, num_beams=2, **options)
    assert ours.hidden_states[0][0].shape[:2] == (2, 4)  # two streams, four rows
    for mine, theirs in zip(ours.hidden_states, stock.hidden_states, strict=True):
        for part, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)


# Models that are known to do one or the other.


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen2_vl", "mistral"])
def test_models_that_keep_all_in_the_cache_are_read_once(name: str) -> None:
    sample = NAMED[name]()
    inputs = {key: sample.inputs[key] for key in ("input_ids", "attention_mask")}
    inputs["input_ids"] = inputs["input_ids"].clamp(max=88)
    stock = run(sample.model, inputs, "beams")[0]
    with hfkv.patch(sample.model) as patch:
        for _ in range(2):
            assert torch.equal(run(sample.model, inputs, "beams")[0], stock)
    assert None not in patch.reads_once.values()
    assert patch.reads_once


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "jamba", "bamba", "qwen3_next", "lfm2", "bert", "xlm"])
def test_state_beside_keys_is_repeated_too(model_type: str) -> None:
    model = of_type(model_type)
    inputs = prompt_for(model)
    stock = {mode: run(model, inputs, mode) for mode in MODES}
    with hfkv.patch(model) as patch:
        for mode, (tokens, logits) in stock.items():
            ours, our_logits = run(model, inputs, mode)
            assert torch.equal(ours, tokens)
            torch.testing.assert_close(our_logits, logits, atol=1e-3, rtol=1e-3)
    is_kept_elsewhere = model_type in ("recurrent_gemma", "xlm")
    assert (None in patch.reads_once.values()) == is_kept_elsewhere


@pytest.mark.parametrize("model_type", ["jamba", "bamba", "qwen3_next"])
def test_forks_of_hybrid_models_repeat_all_states(model_type: str) -> None:
    model = of_type(model_type)
    inputs = prompt(1, 9)
    expected = greedy(model, inputs, 6)
    with hfkv.patch(model) as patch:
        cache = patch.new_cache()
        with torch.no_grad():
            model(inputs["input_ids"][:, :-1], past_key_values=cache)
        three = {name: value.expand(3, -1) for name, value in inputs.items()}
        assert torch.equal(greedy(model, three, 6, past_key_values=cache.fork(3)), expected.expand(3, -1))


def test_a_layer_with_keys_and_a_state_repeats_both() -> None:
    layer = LinearAttentionAndFullAttentionLayer()
    layer.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    layer.update_conv_state(torch.randn(2, 4, 3))
    layer.update_recurrent_state(torch.randn(2, 4))
    rows = [layer.keys, layer.conv_states[0], layer.recurrent_states[0]]
    choose_rows(layer, "batch_repeat_interleave", repeated, 3)
    for before, now in zip(rows, [layer.keys, layer.conv_states[0], layer.recurrent_states[0]], strict=True):
        assert torch.equal(now, before.repeat_interleave(3, dim=0))
