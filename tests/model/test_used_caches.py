"""Caches that are used again: the prompt, the weights and the layers must go on where they end."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

import hfkv
from hfkv import KVCache
from tests.tiny import greedy, llama, llama_for, prompt
from tests.zoo import NAMED


def test_a_conversation_goes_on() -> None:
    model, inputs = llama_for("int8"), prompt(1, 10)
    with hfkv.patch(model, "int8"):
        cache = hfkv.KVCache(model, "int8")
        text = greedy(model, inputs, past_key_values=cache)
        assert cache.holds_tokens is not None
        assert torch.equal(cache.holds_tokens, text[:, :-1])
        more = torch.cat((text, prompt(1, 4)["input_ids"]), dim=1)
        whole = greedy(model, {"input_ids": more})
        assert torch.equal(greedy(model, {"input_ids": more}, past_key_values=copy.deepcopy(cache)), whole)
        # Only what is new, with a mask over all.
        new = more[:, cache.get_seq_length() :]
        mask = torch.ones_like(more)
        ours = greedy(model, {"input_ids": new, "attention_mask": mask}, past_key_values=copy.deepcopy(cache))
        assert torch.equal(ours[:, new.shape[1] :], whole[:, more.shape[1] :])
        assisted = greedy(model, {"input_ids": more}, past_key_values=cache, prompt_lookup_num_tokens=2)
        assert torch.equal(assisted, whole)


@pytest.mark.parametrize("mode", [{}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("own", [True, False])
def test_a_prompt_that_does_not_continue_is_refused(own: bool, mode: dict[str, Any]) -> None:
    model, inputs = llama(), prompt(1, 10)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model) if own else None
        cache = greedy(model, inputs, 5, past_key_values=cache, return_dict_in_generate=True).past_key_values
        other = inputs["input_ids"].clone()
        other[0, 7] += 1
        longer = torch.cat((other, other), dim=1)
        held = cache.holds_tokens.clone()
        with pytest.raises(ValueError, match=r"at position 7 row 0 has token .*cache.crop\(-7\) keeps the 7 tokens"):
            greedy(model, {"input_ids": longer}, past_key_values=cache, **mode)
        with pytest.raises(ValueError, match=r"holds 14 tokens and the prompt has 10.*cache.crop\(-5\)"):
            greedy(model, inputs, past_key_values=cache, **mode)
        assert torch.equal(cache.holds_tokens, held)
        cache.crop(-7)
        expected = greedy(model, {"input_ids": longer}, **mode)
        assert torch.equal(greedy(model, {"input_ids": longer}, past_key_values=cache, **mode), expected)


def test_batches_and_masks_that_do_not_fit_are_refused() -> None:
    model, inputs = llama(), prompt(1, 10)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model)
        text = greedy(model, inputs, 5, past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 1 row and there are 3 prompts: give cache.fork\(3\)"):
            greedy(model, {"input_ids": text.expand(3, -1)}, past_key_values=cache)
        with pytest.raises(ValueError, match="mask is of 13"):
            greedy(model, {"input_ids": text[:, -1:], "attention_mask": torch.ones(1, 13)}, past_key_values=cache)
        mask = torch.ones_like(text)
        mask[0, :2] = 0
        with pytest.raises(ValueError, match="differs in its padding"):
            greedy(model, {"input_ids": text, "attention_mask": mask}, past_key_values=cache)


def test_padded_conversations_go_on() -> None:
    model, inputs = llama(), prompt(2, 10, 3)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model)
        text = greedy(model, inputs, 5, past_key_values=cache)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)), dim=1)
        more = {"input_ids": text, "attention_mask": mask}
        whole = greedy(model, more)
        assert torch.equal(greedy(model, more, past_key_values=cache), whole)


def test_other_weights_are_refused() -> None:
    model, other, inputs = llama(), llama(hidden_size=32), prompt(1, 10)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model)
        text = greedy(model, inputs, 5, past_key_values=cache)
        with hfkv.patch(other), pytest.raises(ValueError, match="another model"):
            greedy(other, {"input_ids": text}, past_key_values=cache)
        same = copy.deepcopy(model)
        assert torch.equal(
            greedy(same, {"input_ids": text}, past_key_values=cache.fork()),
            greedy(model, {"input_ids": text}, past_key_values=cache.fork()),
        )
        with torch.no_grad():
            model.model.embed_tokens.weight[5] += 1
        with pytest.raises(ValueError, match="other weights"):
            greedy(model, {"input_ids": text}, past_key_values=cache)
        cache.reset()
        assert torch.equal(
            greedy(model, {"input_ids": text}, past_key_values=cache), greedy(model, {"input_ids": text})
        )


def fail(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kv", ["none", "int8+window:6+sinks:2", "offload"])
def test_a_forward_that_fails_midway_is_taken_back(kv: str) -> None:
    model, inputs = llama_for(kv), prompt(1, 10)
    with hfkv.patch(model, kv):
        cache = hfkv.KVCache(model, kv)
        text = greedy(model, inputs, 5, past_key_values=cache)
        held = cache.holds_tokens
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, {"input_ids": text}, past_key_values=cache)
        hook.remove()
        assert torch.equal(cache.holds_tokens, held)
        assert torch.equal(
            greedy(model, {"input_ids": text}, past_key_values=cache), greedy(model, {"input_ids": text})
        )


def test_a_forward_that_fails_midway_is_noticed_where_it_cannot_be_taken_back() -> None:
    sample = NAMED["qwen3_next"]()
    model, inputs = sample.model, {name: value[1:] for name, value in sample.inputs.items()}
    with hfkv.patch(model):
        cache = hfkv.KVCache(model)
        text = greedy(model, inputs, 5, past_key_values=cache)
        hook = model.model.layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, {"input_ids": text}, past_key_values=cache)
        hook.remove()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"failed midway \(KeyboardInterrupt.*cache.reset\(\)"):
                greedy(model, {"input_ids": text}, past_key_values=cache)
        with pytest.raises(RuntimeError, match="failed midway"):
            model(text[:, -1:], past_key_values=cache)
        cache.reset()
        assert torch.equal(
            greedy(model, {"input_ids": text}, past_key_values=cache), greedy(model, {"input_ids": text})
        )


def test_what_a_cache_holds() -> None:
    model, inputs = llama(), prompt(2, 10, 3)
    ids = inputs["input_ids"]
    with torch.no_grad():
        unpatched = hfkv.KVCache(model)
        model(**inputs, past_key_values=unpatched)
        assert unpatched.holds_tokens is None
        with hfkv.patch(model):
            cache = hfkv.KVCache(model)
            assert cache.holds_tokens is None
            model(**inputs, past_key_values=cache)
            assert torch.equal(cache.holds_tokens, ids)
            cache.reorder_cache(torch.tensor([1, 1]))
            assert torch.equal(cache.holds_tokens, ids[[1, 1]])
            cache.batch_repeat_interleave(2)
            cache.crop(-4)
            assert torch.equal(cache.holds_tokens, ids[[1, 1, 1, 1], :6])
            cache.batch_select_indices(torch.tensor([True, False, False, True]))
            assert cache.holds_tokens.shape == (2, 6)
            cache.reset()
            assert cache.holds_tokens is None
            model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
            assert cache.holds_tokens is None
            # What an unpatched model has filled goes on, but cannot be checked.
            with pytest.raises(ValueError, match="not known"):
                greedy(model, inputs, past_key_values=unpatched)


def test_stock_caches_are_left_alone() -> None:
    model, inputs = llama(), prompt(1, 10)
    with hfkv.patch(model):
        cache = DynamicCache(config=model.config)
        text = greedy(model, inputs, 5, past_key_values=cache)
        assert cache.get_seq_length() == 14
        assert torch.equal(
            greedy(model, {"input_ids": text}, past_key_values=cache), greedy(model, {"input_ids": text})
        )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_assistant_on_a_used_cache_of_an_encoder_decoder_is_refused(name: str) -> None:
    model, ids = NAMED[name]().model, torch.arange(5, 12)[None]
    with hfkv.patch(model):
        output = model.generate(ids, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        given = {"past_key_values": output.past_key_values, "decoder_input_ids": output.sequences, "max_new_tokens": 3}
        with pytest.raises(NotImplementedError, match="would be read twice"):
            model.generate(ids, **given, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("kv", ["none", "int8", "paged", "window:5", "offload"])
def test_a_cache_filled_in_inference_mode_goes_on_outside_it(kv: str) -> None:
    model, inputs = llama_for(kv), prompt(length=20)
    with hfkv.patch(model, kv):
        expected = greedy(model, inputs)
        cache = KVCache(model, kv)
        cache.reserve(64)
        with torch.inference_mode():
            model(inputs["input_ids"][:, :10], past_key_values=cache)
            cache.reorder_cache(torch.tensor([0, 1]))
        assert torch.equal(greedy(model, inputs, past_key_values=cache), expected)


def test_a_prompt_that_failed_before_its_first_forward_leaves_nothing_behind() -> None:
    model, assistant, inputs = llama(), llama(), prompt(1, 8)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model)
        text = greedy(model, inputs, past_key_values=cache)

        def fail(*args: Any) -> None:
            raise MemoryError

        hook = assistant.model.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            greedy(model, {"input_ids": text}, past_key_values=cache, assistant_model=assistant)
        hook.remove()
        held = cache.get_seq_length()
        new = torch.cat((text[:, held:], text), dim=1)
        with torch.no_grad():
            logits = model(input_ids=new, past_key_values=cache).logits
            assert cache.get_seq_length() == held + new.shape[1]
            torch.testing.assert_close(
                logits[:, -1], model(torch.cat((text, text), dim=1)).logits[:, -1], atol=1e-4, rtol=1e-4
            )


def test_new_tokens_alone_come_with_the_padding_that_was_read() -> None:
    model, inputs = llama(), prompt(2, 10, 3)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model)
        text = greedy(model, inputs, 5, past_key_values=cache)
        new, mask = text[:, -1:], torch.ones_like(text)
        for wrong in (mask, torch.cat((inputs["attention_mask"].flip(0), torch.ones_like(text[:, :5])), dim=1)):
            with pytest.raises(ValueError, match="differs in its padding"):
                greedy(model, {"input_ids": new, "attention_mask": wrong}, past_key_values=cache)


def test_the_padding_behind_a_row_that_ended_may_be_hidden() -> None:
    model, inputs = llama(), prompt(2, 10)
    ids = torch.cat((inputs["input_ids"], torch.tensor([[7, 0, 0], [8, 9, 10]])), dim=1)
    more = torch.cat((ids, inputs["input_ids"]), dim=1)
    mask = torch.ones_like(more)
    mask[0, 11:13] = 0
    whole = {"input_ids": more, "attention_mask": mask}
    with torch.no_grad():
        stock = DynamicCache(config=model.config)
        model(ids, past_key_values=stock)
        expected = greedy(model, whole, past_key_values=stock)
        with hfkv.patch(model):
            cache = hfkv.KVCache(model)
            model(ids, past_key_values=cache)
            assert torch.equal(greedy(model, whole, past_key_values=copy.deepcopy(cache)), expected)
            mask[1, 3] = 0
            with pytest.raises(ValueError, match="at position 4 row 1 differs in its padding"):
                greedy(model, whole, past_key_values=cache)
