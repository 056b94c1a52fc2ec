"""What an outsider broke in sharing, once."""

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import DynamicCache

import hfkv
from hfkv import tiny_lm
from tests.tiny import greedy, llama, prompt
from tests.zoo import NAMED, generate

KV = "none+paged+page_size:8"
SHARED = KV + "+reuse"


def by_hand_at_own_positions(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model(ids[:, :30], position_ids=2 * torch.arange(30)[None], past_key_values=cache)


def by_hand_in_training(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model(ids[:, :30], past_key_values=cache)
    model.eval()


def by_hand_under_other_weights(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model(ids[:, :10], past_key_values=cache)
    weight = model.model.layers[0].self_attn.k_proj.weight
    before, weight.data = weight.data, 2 * weight.data
    model(ids[:, 10:30], past_key_values=cache)
    weight.data = before


def generated_then_by_hand(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model.generate(ids[:, :10], past_key_values=cache, max_new_tokens=1)
    by_hand = ids[:, cache.get_seq_length() : 30]
    model(by_hand, position_ids=torch.arange(by_hand.shape[1])[None] + 50, past_key_values=cache)


def generated_at_own_positions(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    model.generate(ids[:, :10], past_key_values=cache, max_new_tokens=1)
    model.generate(ids[:, :30], past_key_values=cache, position_ids=2 * torch.arange(30)[None], max_new_tokens=1)


def saved_and_loaded(model: Any, cache: hfkv.KVCache, ids: torch.Tensor) -> None:
    by_hand_at_own_positions(model, cache, ids)
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied.holds_tokens, cache.holds_tokens)


@pytest.mark.parametrize(
    "fill",
    [
        by_hand_at_own_positions,
        by_hand_in_training,
        by_hand_under_other_weights,
        generated_then_by_hand,
        generated_at_own_positions,
        saved_and_loaded,
    ],
)
def test_what_was_computed_in_another_way_never_comes_into_the_pool(fill: Any) -> None:
    model, inputs = llama(), prompt(1, 40)
    expected = greedy(model, inputs)
    with hfkv.patch(model, SHARED):
        cache = hfkv.KVCache(model, KV)
        with torch.no_grad():
            fill(model, cache, inputs["input_ids"])
        greedy(model, inputs, past_key_values=cache)
        assert torch.equal(greedy(model, inputs), expected)


def test_tokens_that_were_not_written_down_are_not_made_up() -> None:
    model, ids = llama(), prompt(1, 40)["input_ids"]
    with hfkv.patch(model, SHARED), torch.no_grad():
        cache = hfkv.KVCache(model, KV)
        model.model(ids[:, :10], past_key_values=cache)
        model(ids[:, 10:30], past_key_values=cache)
        assert cache.holds_tokens is None
        cache.crop(-20)
        assert cache.holds_tokens is None
        model(ids[:, 10:30], past_key_values=cache)
        assert cache.holds_tokens is None
        cache.reset()
        model(ids, past_key_values=cache)
        assert torch.equal(cache.holds_tokens, ids)


def test_hidden_states_of_all_tokens_are_read_and_spoil_nothing_after() -> None:
    model, inputs = llama(), prompt(1, 40)
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    with hfkv.patch(model, SHARED) as patch:
        for _ in range(2):
            output = greedy(model, inputs, **options)
            assert output.hidden_states[0][0].shape[1] == 40
        assert patch.reuse_stats().lookups == 0
        greedy(model, inputs)
        greedy(model, inputs)
        # transformers captures hidden states by hooks that stay.
        assert patch.reuse_stats().hits == 1
        for _ in range(2):
            cache = greedy(model, inputs, 1, past_key_values=hfkv.KVCache(model), return_dict_in_generate=True)
            longer = torch.cat((cache.sequences, inputs["input_ids"]), dim=1)
            beams = greedy(model, {"input_ids": longer}, num_beams=3, past_key_values=cache.past_key_values, **options)
            assert torch.equal(beams.sequences, greedy(model, {"input_ids": longer}, num_beams=3))


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


def test_stop_strings() -> None:
    model, tokenizer = tiny_lm.load(torch.float32)
    inputs = tokenizer("def f(x):\n    return x\n\ndef g", return_tensors="pt")
    options = {"stop_strings": ["\n"], "tokenizer": tokenizer, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, **options)
    with hfkv.patch(model, SHARED) as patch:
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert patch.reuse_stats().hits == 1


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


@pytest.mark.parametrize("put_away", [accelerate.cpu_offload, accelerate.disk_offload])
def test_weights_that_accelerate_has_put_away(put_away: Any, tmp_path: Path) -> None:
    model, inputs = llama(), prompt(1, 40)
    expected = greedy(model, inputs)
    if put_away is accelerate.disk_offload:
        put_away(model, offload_dir=str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    else:
        put_away(model, execution_device=torch.device("cpu"))
    with hfkv.patch(model, SHARED) as patch:
        for _ in range(2):
            assert torch.equal(greedy(model, inputs), expected)
        assert patch.reuse_stats().hits == 1
        cache = patch.new_cache()
        text = {"input_ids": greedy(model, inputs, past_key_values=cache)}
        cache.save(tmp_path / "cache.safetensors")
        more = greedy(model, text)
        for used in (cache, hfkv.KVCache.load(tmp_path / "cache.safetensors", model)):
            assert torch.equal(greedy(model, text, past_key_values=used), more)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_text_alone_is_shared_by_models_of_images_too(name: str) -> None:
    model = NAMED[name]().model
    inputs = {"input_ids": torch.randint(10, 60, (1, 20)), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    expected, _ = generate(model, inputs)
    beams, _ = generate(model, inputs, num_beams=3)
    with hfkv.patch(model, "none+paged+page_size:4+reuse") as patch:
        for _ in range(2):
            assert torch.equal(generate(model, inputs)[0], expected)
        assert patch.reuse_stats().hits == 1
        assert torch.equal(generate(model, inputs, num_beams=3)[0], beams)


def test_what_accelerate_has_wrapped_since_stays_wrapped() -> None:
    model, inputs = llama(), prompt(1, 20)
    expected = greedy(model, inputs)
    patch = hfkv.patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(greedy(model, inputs), expected)
    patch.undo()
    assert torch.equal(greedy(model, inputs), expected)
    cache = hfkv.KVCache(model)
    assert torch.equal(greedy(model, inputs, past_key_values=cache), expected)
    assert cache.holds_tokens is None
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(greedy(model, inputs), expected)
    with hfkv.patch(model):
        assert torch.equal(greedy(model, inputs), expected)
