"""PEFT around a patched model: every adapter, greedy in fp32, gives the tokens it gives without hfkv."""

import pytest
import torch

import hfkv
from tests.tiny import llama, prompt

peft = pytest.importorskip("peft")
# PEFT 0.21 itself reads the attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NEW_TOKENS, VIRTUAL_TOKENS = 12, 5
LOSSLESS = [None, "paged+page_size:4", "offload"]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


@torch.no_grad()
def redraw(model, where, std=0.3):
    for name, parameter in model.named_parameters():
        if where(name, parameter):
            parameter.normal_(0, std)


def lora(model):
    """A `PeftModel` whose adapter changes what the model says."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=TARGETS)
    peft_model = peft.get_peft_model(model, config).eval()
    redraw(peft_model, lambda name, _: "lora_B" in name)
    return peft_model


def two_loras():
    peft_model = lora(llama())
    peft_model.add_adapter("second", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=TARGETS))
    redraw(peft_model, lambda name, _: "lora_B.second" in name)
    return peft_model.eval()


def prompt_learner(model, config_class):
    torch.manual_seed(1)
    peft_model = peft.get_peft_model(model, config_class(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM"))
    redraw(peft_model, lambda name, _: "prompt_encoder" in name, std=0.8)
    return peft_model.eval()


def prefix(model):
    return prompt_learner(model, peft.PrefixTuningConfig)


def soft_prompt(model):
    return prompt_learner(model, peft.PromptTuningConfig)


def run(model, inputs, **kwargs):
    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **(greedy | kwargs))


def tokens(model, inputs, **kwargs):
    new = run(model, inputs, **kwargs).sequences[:, -NEW_TOKENS:]
    assert all(len(set(row.tolist())) > NEW_TOKENS // 3 for row in new), "the model repeats itself: nothing is tested"
    return new


def assert_kv_cache(output, kv):
    assert isinstance(output.past_key_values, hfkv.KVCache)
    assert output.past_key_values.kv == hfkv.KVConfig.of(kv)
    assert torch.stack(output.logits).isfinite().all()


def attributes(model):
    """Every attribute of every module, by identity, and what the configs say."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[name, key] = value
            if isinstance(value, dict):
                found |= {(name, key, inner): item for inner, item in value.items()}
        if hasattr(module, "config"):
            found[name, "attention"] = module.config._attn_implementation
    return found


def assert_same_attributes(model, before):
    after = attributes(model)
    assert after.keys() == before.keys()
    assert [key for key in after if after[key] is not before[key]] == []


MAKERS = pytest.mark.parametrize("make", [lora, prefix, soft_prompt], ids=["lora", "prefix", "prompt"])
PADDING = pytest.mark.parametrize("padding", [0, 3], ids=["unpadded", "padded"])


@PADDING
@pytest.mark.parametrize("kv", LOSSLESS, ids=str)
@MAKERS
def test_tokens_are_those_of_the_unpatched_model(make, kv, padding):
    model, inputs = make(llama()), prompt(padding=padding)
    stock = tokens(model, inputs)
    assert not torch.equal(stock, tokens(llama(), inputs)), "the adapter changes nothing: nothing is tested"
    with hfkv.patch(model, kv=kv):
        output = run(model, inputs)
    assert torch.equal(output.sequences[:, -NEW_TOKENS:], stock)
    assert_kv_cache(output, kv)


@MAKERS
def test_beams_are_those_of_the_unpatched_model(make):
    model, inputs = make(llama()), prompt(padding=3)
    stock = tokens(model, inputs, num_beams=3)
    with hfkv.patch(model, kv="paged+page_size:4"):
        assert torch.equal(tokens(model, inputs, num_beams=3), stock)


@PADDING
@MAKERS
def test_an_int8_cache_is_used_and_logits_stay_close(make, padding):
    model, inputs = make(llama()), prompt(padding=padding)
    stock = run(model, inputs)
    with hfkv.patch(model, kv="int8"):
        output = run(model, inputs)
    assert_kv_cache(output, "int8")
    error = (output.logits[0] - stock.logits[0]).abs().max() / stock.logits[0].abs().max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("kv", [*LOSSLESS, "int8"], ids=str)
def test_an_explicit_cache_needs_no_patch(kv):
    model, inputs = lora(llama()), prompt(padding=3)
    output = run(model, inputs, past_key_values=hfkv.KVCache(model, kv))
    assert_kv_cache(output, kv)
    if hfkv.KVConfig.of(kv).is_lossless:
        assert torch.equal(output.sequences, run(model, inputs).sequences)


@pytest.mark.parametrize("make", [lora, soft_prompt, prefix])
def test_an_explicit_cache_is_the_one_used_on_a_patched_model(make):
    model = make(llama())
    with hfkv.patch(model):
        cache = hfkv.KVCache(model.get_base_model(), "int8")
        output = run(model, prompt(), past_key_values=cache)
    assert output.past_key_values is cache


@pytest.mark.parametrize("kv", [None, "paged+page_size:4", "int8"], ids=str)
def test_each_row_of_a_mixed_batch_follows_its_own_adapter(kv):
    model, inputs, names = two_loras(), prompt(batch=3, padding=3), ["default", "second", "__base__"]
    stock = tokens(model, inputs, adapter_names=names)
    with hfkv.patch(model, kv=kv):
        output = run(model, inputs, adapter_names=names)
    assert_kv_cache(output, kv)
    if kv != "int8":
        assert torch.equal(output.sequences[:, -NEW_TOKENS:], stock)
    unmixed = [tokens(model, inputs, adapter_names=[name] * 3) for name in names]
    assert all(torch.equal(stock[row], unmixed[row][row]) for row in range(3))
    assert not torch.equal(unmixed[0], unmixed[1])


@pytest.mark.parametrize("kv", [None, "int8"], ids=str)
def test_set_adapter_and_disable_adapter_between_calls(kv):
    model, inputs = two_loras(), prompt(padding=3)

    def calls():
        found = []
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            found.append(run(model, inputs))
        with model.disable_adapter():
            found.append(run(model, inputs))
        return [*found, run(model, inputs)]

    stock = [output.sequences for output in calls()]
    assert not torch.equal(stock[0], stock[1])
    assert not torch.equal(stock[0], stock[3])
    with hfkv.patch(model, kv=kv):
        ours = calls()
    for output in ours:
        assert_kv_cache(output, kv)
    # The same adapter gives the same tokens again: no call sees another's cache.
    assert torch.equal(ours[0].sequences, ours[2].sequences)
    assert torch.equal(ours[0].sequences, ours[4].sequences)
    if kv is None:
        assert all(torch.equal(output.sequences, tokens) for output, tokens in zip(ours, stock, strict=True))


@pytest.mark.parametrize("kv", [None, "int8"], ids=str)
def test_merge_and_unmerge_under_a_patch(kv):
    model, inputs = lora(llama()), prompt(padding=3)
    adapted = tokens(model, inputs)
    with hfkv.patch(model, kv=kv):
        model.merge_adapter()
        merged = run(model, inputs)
        model.unmerge_adapter()
        unmerged = run(model, inputs)
    for output in (merged, unmerged):
        assert_kv_cache(output, kv)
        if kv is None:
            assert torch.equal(output.sequences[:, -NEW_TOKENS:], adapted)


@pytest.mark.parametrize("kv", [None, "int8"], ids=str)
def test_merge_and_unload_gives_a_patched_model_that_unpatch_restores(kv):
    model, inputs = lora(llama()), prompt(padding=3)
    adapted = tokens(model, inputs)
    hfkv.patch(model, kv=kv)
    plain = model.merge_and_unload()
    output = run(plain, inputs)
    assert_kv_cache(output, kv)
    if kv is None:
        assert torch.equal(output.sequences[:, -NEW_TOKENS:], adapted)
    hfkv.unpatch(plain)
    assert plain.config._attn_implementation == "sdpa"
    assert not isinstance(run(plain, inputs).past_key_values, hfkv.KVCache)
    assert torch.equal(tokens(plain, inputs), adapted)


@PADDING
@pytest.mark.parametrize("kv", [None, "int8"], ids=str)
@MAKERS
def test_a_patched_model_can_be_wrapped_by_peft(make, kv, padding):
    inputs = prompt(padding=padding)
    stock = tokens(make(llama()), inputs)
    base = llama()
    hfkv.patch(base, kv=kv)
    model = make(base)
    output = run(model, inputs)
    if kv is None:
        assert torch.equal(output.sequences[:, -NEW_TOKENS:], stock)
    assert_kv_cache(output, kv)
    hfkv.unpatch(model)
    assert torch.equal(tokens(model, inputs), stock)


@MAKERS
def test_a_cache_is_allocated_once_with_room_for_virtual_tokens(make):
    model = make(llama())
    with hfkv.patch(model):
        cache = run(model, prompt(), max_new_tokens=300).past_key_values
    assert cache.held_bytes() <= cache.nbytes() <= 1.02 * cache.held_bytes()


@MAKERS
def test_unpatch_restores_every_attribute_of_every_module(make):
    model, inputs = make(llama()), prompt()
    stock = tokens(model, inputs)  # PEFT sets attributes of its own in the first call
    before = attributes(model)
    hfkv.patch(model, kv="int8+window:8")
    assert attributes(model).keys() != before.keys()
    run(model, inputs)
    hfkv.unpatch(model)
    assert_same_attributes(model, before)
    assert torch.equal(tokens(model, inputs), stock)


@MAKERS
def test_a_training_step_has_the_gradients_of_the_unpatched_model(make):
    model, inputs = make(llama()).train(), prompt(padding=3)

    def gradients():
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    stock = gradients()
    assert all(gradient.abs().max() > 0 for gradient in stock.values())
    with hfkv.patch(model, kv="int8"):
        torch.testing.assert_close(gradients(), stock)


@MAKERS
def test_an_adapter_saved_from_a_patched_model_loads_onto_a_patched_model(make, tmp_path):
    inputs = prompt(padding=3)
    model = make(llama())
    hfkv.patch(model)
    adapted = tokens(model, inputs)
    model.save_pretrained(tmp_path)
    base = llama()
    hfkv.patch(base)
    assert torch.equal(tokens(peft.PeftModel.from_pretrained(base, tmp_path).eval(), inputs), adapted)
    assert torch.equal(tokens(peft.PeftModel.from_pretrained(llama(), tmp_path).eval(), inputs), adapted)


def test_an_adapter_added_by_transformers_itself_works_under_a_patch():
    model, inputs = llama(), prompt(padding=3)
    plain = tokens(model, inputs)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS))
    redraw(model, lambda name, _: "lora_B" in name)
    stock = tokens(model.eval(), inputs)
    assert not torch.equal(stock, plain)
    with hfkv.patch(model):
        output = run(model, inputs)
        assert torch.equal(output.sequences[:, -NEW_TOKENS:], stock)
        assert_kv_cache(output, None)
        model.disable_adapters()
        assert torch.equal(tokens(model, inputs), plain)
