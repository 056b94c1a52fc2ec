"""bitsandbytes weights in 8 and 4 bits on a CPU, under every hfkv cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hfkv
from tests.tiny import llama, prompt

bitsandbytes = pytest.importorskip("bitsandbytes")

LENGTH, NEW_TOKENS = 24, 12
LOSSLESS = [None, "offload", "paged+page_size:8", "offload+paged+page_size:8"]
LOSSY = ["window:16", "int8", "int4", "fp8", "int8+window:16", "int8+paged+page_size:8", "int4+offload"]
WEIGHTS = {
    "8bit": (BitsAndBytesConfig(load_in_8bit=True), "Linear8bitLt"),
    "4bit": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), "Linear4bit"),
    "nf4": (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "Linear4bit",
    ),
}


def tiny_model():
    # bitsandbytes' 4-bit code for CPUs wants widths of whole blocks: 64.
    return llama(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=WEIGHTS)
def model(request, folder):
    quantization, linear = WEIGHTS[request.param]
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == linear
    loaded.bits = request.param
    return loaded


def run(model, inputs, **kwargs):
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return output.sequences[:, LENGTH:], torch.stack(output.logits), output.past_key_values


def stock_run(model, inputs):
    tokens, logits, cache = run(model, inputs)
    assert not isinstance(cache, hfkv.KVCache)
    assert all(len(set(row.tolist())) > NEW_TOKENS // 3 for row in tokens), "the model repeats itself"
    return tokens, logits


@pytest.mark.parametrize("kv", LOSSLESS, ids=str)
def test_a_lossless_cache_gives_the_tokens_of_dynamic_cache_for_one_row(model, kv):
    inputs = prompt(batch=1, length=LENGTH)
    stock, _ = stock_run(model, inputs)
    with hfkv.patch(model, kv=kv):
        tokens, _, cache = run(model, inputs)
    assert torch.equal(tokens, stock)
    assert isinstance(cache, hfkv.KVCache)


@pytest.mark.parametrize("kv", LOSSLESS, ids=str)
def test_a_lossless_cache_gives_the_tokens_of_dynamic_cache_for_a_padded_batch(model, kv):
    if model.bits == "8bit":
        pytest.skip("LLM.int8 makes a row depend on the rest of its batch, pad tokens included")
    inputs = prompt(batch=3, length=LENGTH, padding=5)
    stock, _ = stock_run(model, inputs)
    with hfkv.patch(model, kv=kv):
        tokens, _, _ = run(model, inputs)
    assert torch.equal(tokens, stock)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kv", LOSSY)
def test_a_lossy_cache_holds_what_it_says_and_the_logits_are_finite(model, kv, rows):
    inputs = prompt(batch=rows, length=LENGTH)
    _, stock = stock_run(model, inputs)
    with hfkv.patch(model, kv=kv):
        _, logits, cache = run(model, inputs)
    assert isinstance(cache, hfkv.KVCache)
    assert cache.kv == hfkv.KVConfig.parse(kv)
    assert logits.isfinite().all()
    assert not torch.equal(logits, stock), "a lossy cache that changes no logit was not read"


@pytest.mark.parametrize("kv", [None, "int8"], ids=str)
def test_an_explicit_cache_needs_no_patch(model, kv):
    inputs = prompt(batch=1, length=LENGTH)
    stock, _ = stock_run(model, inputs)
    explicit = hfkv.KVCache(model, kv)
    tokens, logits, cache = run(model, inputs, past_key_values=explicit)
    assert cache is explicit
    assert logits.isfinite().all()
    if kv is None:
        assert torch.equal(tokens, stock)


def test_an_int8_cache_adds_less_than_half_the_error_of_the_weights(model):
    inputs = prompt(batch=1, length=LENGTH)
    _, exact, _ = run(tiny_model(), inputs)
    _, stock = stock_run(model, inputs)
    with hfkv.patch(model, kv="int8"):
        _, logits, _ = run(model, inputs)
    # The prompt's next token: later ones follow texts that may differ.
    assert (logits[0] - stock[0]).norm() < 0.5 * (stock[0] - exact[0]).norm()


def test_unpatch_restores_the_quantized_model(model):
    inputs = prompt(batch=1, length=LENGTH)
    stock, logits = stock_run(model, inputs)
    attention = model.config._attn_implementation
    hfkv.patch(model, kv="int4")
    assert model.config._attn_implementation == "hfkv"
    hfkv.unpatch(model)
    again, logits_again = stock_run(model, inputs)
    assert torch.equal(again, stock)
    assert torch.equal(logits_again, logits)
    assert model.config._attn_implementation == attention


def test_quantised_weights_share_prefixes_and_their_caches_go_on(folder, tmp_path):
    for quantization, _ in WEIGHTS.values():
        # Fresh weights: some are packed anew by their first forward, which is no change of theirs.
        fresh = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
        inputs = prompt(1, LENGTH)
        with hfkv.patch(fresh, "paged+page_size:8+reuse") as patch:
            cache = patch.new_cache()
            text, _, _ = run(fresh, inputs, past_key_values=cache)
            again, _, _ = run(fresh, inputs)
            assert torch.equal(again, text)
            assert patch.reuse_stats().hits == 1
            ids = torch.cat((inputs["input_ids"], text, text), dim=1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            expected = run(fresh, more)[0]
            cache.save(tmp_path / "cache.safetensors")
            unused = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
            loaded = hfkv.KVCache.load(tmp_path / "cache.safetensors", unused)
            for used in (cache, loaded):
                assert torch.equal(run(fresh, more, past_key_values=used)[0], expected)
