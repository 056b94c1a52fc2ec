"""Adapters and shared prefixes: never a page that another state of the adapters has computed."""

import pytest
import torch

import hfkv
from tests.integration.test_peft import lora, prefix, soft_prompt, two_loras
from tests.tiny import llama, prompt

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KV = "none+paged+page_size:8+reuse"
NEW_TOKENS = 10


def say(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


def train_a_step(model):
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    assert trainable
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    ids = prompt(1, 12)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def switch(model):
    model.set_adapter("second")


def switch_back(model):
    model.set_adapter("default")


def both(model):
    model.base_model.set_adapter(["default", "second"])


def merge(model):
    model.merge_adapter()


def unmerge(model):
    model.unmerge_adapter()


def disable(model):
    model.base_model.disable_adapter_layers()


def enable(model):
    model.base_model.enable_adapter_layers()


def scale(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


def redraw(model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B.default" in name:
                weight.data.mul_(2.0)


CHANGES = (switch, switch_back, both, switch_back, merge, unmerge, disable, enable, scale, redraw, train_a_step)


@pytest.mark.smoke
def test_no_change_of_the_adapters_ever_hits_the_pages_of_another():
    """Each change by itself and one after the other: the tokens of a model that shares nothing."""
    shares, alone = two_loras(), two_loras()
    inputs = prompt(1, 60)
    texts = []
    with hfkv.patch(shares, KV) as patch, hfkv.patch(alone, KV.replace("+reuse", "")):
        for change in (None, *CHANGES):
            if change is not None:
                change(shares)
                change(alone)
            expected = say(alone, inputs)
            texts.append(expected[0].tolist())
            before = patch.reuse_stats()
            assert torch.equal(say(shares, inputs), expected), change
            found = patch.reuse_stats().hits - before.hits
            # Back at an adapter whose weights have not changed, its pages are found; in any other case none are.
            assert found == (change in (switch_back, enable)), change
            assert torch.equal(say(shares, inputs), expected), change
            assert patch.reuse_stats().hits - before.hits == found + 1
    # The changes do change what is said.
    assert len({tuple(text) for text in texts}) >= 7


def test_two_adapters_in_one_batch_share_nothing():
    model, twin = two_loras(), two_loras()
    inputs = prompt(2, 40)
    inputs = {name: value[:1].expand(2, -1) for name, value in inputs.items()}
    names = ["default", "second"]
    expected = say(twin, inputs, adapter_names=names)
    with hfkv.patch(model, KV) as patch:
        for _ in range(2):
            say(model, {name: value[:1] for name, value in inputs.items()})
        lookups = patch.reuse_stats().lookups
        for _ in range(2):
            assert torch.equal(say(model, inputs, adapter_names=names), expected)
        assert patch.reuse_stats().lookups == lookups
    assert not torch.equal(expected[0], expected[1])


def test_two_adapters_in_one_batch_with_beams_are_read_row_by_row():
    model, twin = two_loras(), two_loras()
    inputs = {name: value[:1].expand(2, -1) for name, value in prompt(2, 20).items()}
    names = ["default", "second"]
    expected = say(twin, inputs, adapter_names=names, num_beams=3)
    with hfkv.patch(model, KV):
        assert torch.equal(say(model, inputs, adapter_names=names, num_beams=3), expected)


@pytest.mark.parametrize("learned", [prefix, soft_prompt])
def test_learned_prompts_share_nothing(learned):
    expected = say(learned(llama()), prompt(1, 40))
    model = learned(llama())
    with hfkv.patch(model, KV) as patch:
        base = model.get_base_model()
        base.generate(**prompt(1, 40), max_new_tokens=1)
        base.generate(**prompt(1, 40), max_new_tokens=1)
        assert patch.reuse_stats().hits == 1
        for _ in range(2):
            assert torch.equal(say(model, prompt(1, 40)), expected)
        assert patch.reuse_stats().lookups == 2


def test_an_adapter_loaded_under_an_old_name_finds_nothing(tmp_path):
    model = lora(llama())
    other = lora(llama())
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "lora_B" in name:
                weight.mul_(-2)
    other.save_pretrained(tmp_path)
    expected = say(other, prompt(1, 40))
    with hfkv.patch(model, KV) as patch:
        say(model, prompt(1, 40))
        model.add_adapter("spare", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
        model.set_adapter("spare")
        model.delete_adapter("default")
        model.load_adapter(tmp_path, "default")
        model.set_adapter("default")
        model.eval()
        assert torch.equal(say(model, prompt(1, 40)), expected)
        assert patch.reuse_stats().hits == 0


def test_a_used_cache_is_refused_by_another_adapter():
    model = two_loras()
    inputs = prompt(1, 20)
    with hfkv.patch(model):
        cache = hfkv.KVCache(model.get_base_model())
        text = {"input_ids": say(model, inputs, past_key_values=cache)}
        switch(model)
        with pytest.raises(ValueError, match=r"another state of the adapters: active default .* and not active second"):
            say(model, text, past_key_values=cache)
        switch_back(model)
        expected = say(model, text)
        assert torch.equal(say(model, text, past_key_values=cache.fork()), expected)
        merge(model)
        with pytest.raises(ValueError, match="merged default"):
            say(model, text, past_key_values=cache)
        unmerge(model)
        train_a_step(model.train())
        model.eval()
        with pytest.raises(ValueError, match="other weights"):
            say(model, text, past_key_values=cache)
