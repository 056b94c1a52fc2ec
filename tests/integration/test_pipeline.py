"""A patched model inside the code people already have: pipelines, accelerate, threads, copies, streamers."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import hfkv
from tests.tiny import llama, llama_config

NEW_TOKENS = 14
LOSSLESS = [None, "paged+page_size:8", "offload"]
PROMPTS = ["def main():", "x = 1", "import torch", "for row in table: print(row)"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def byte_tokenizer():
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    vocabulary = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left", chat_template=CHAT_TEMPLATE
    )


BYTES = {"vocab_size": 257, "pad_token_id": 256, "bos_token_id": None}


@pytest.fixture
def model():
    return llama(**BYTES)


def watch_caches(model):
    """The kinds of cache the decoder is called with from here on."""
    kinds = set()
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: kinds.add(type(kwargs["past_key_values"]).__name__), with_kwargs=True
    )
    return kinds


def inputs_of(*prompts):
    return byte_tokenizer()(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)


def generate(model, *prompts, **kwargs):
    inputs = inputs_of(*prompts)
    output = model.generate(
        **inputs, **({"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True} | kwargs)
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.past_key_values


def new_tokens(model, *prompts, **kwargs):
    tokens, _ = generate(model, *prompts, **kwargs)
    assert all(len(set(row.tolist())) > 4 for row in tokens), "the model repeats itself: nothing is tested"
    return tokens


CALLS = {
    "single": (PROMPTS[3], {}),
    "list": (PROMPTS, {}),
    "padded batches": (PROMPTS, {"batch_size": 2}),
    "one padded batch": (PROMPTS, {"batch_size": 4}),
    "chat": (CHATS[0], {}),
    "chats in padded batches": (CHATS, {"batch_size": 2}),
    "beams": (PROMPTS, {"batch_size": 2, "num_beams": 3, "num_return_sequences": 2}),
}


@pytest.mark.parametrize("kv", [*LOSSLESS, "int8"], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_an_existing_pipeline_goes_on_as_before(model, call, kv):
    texts, options = CALLS[call]
    pipe = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_tensors": True} | options
    stock = pipe(texts, **options)
    with hfkv.patch(model, kv=kv):
        kinds = watch_caches(model)
        # Twice: a second call must not see the first one's cache.
        ours = [pipe(texts, **options) for _ in range(2)]
    assert kinds == {"KVCache"}
    assert ours[0] == ours[1]
    if kv != "int8":
        assert ours[0] == stock


def test_a_pipeline_returns_text(model):
    pipe = pipeline("text-generation", model=model, tokenizer=byte_tokenizer(), max_new_tokens=NEW_TOKENS)
    stock = pipe(PROMPTS, do_sample=False)
    hfkv.patch(model)
    assert pipe(PROMPTS, do_sample=False) == stock
    assert all(row[0]["generated_text"].startswith(prompt) for row, prompt in zip(stock, PROMPTS, strict=True))


@pytest.mark.parametrize("kv", [*LOSSLESS, "int8+window:8"], ids=str)
@pytest.mark.parametrize("placement", ["auto", "disk"])
def test_accelerate_places_a_patched_model(model, tmp_path, placement, kv):
    stock = new_tokens(model, PROMPTS[0])
    model.save_pretrained(tmp_path / "model")
    disk = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    disk |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto" if placement == "auto" else disk,
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )
    assert (placed.model.layers[0].self_attn.q_proj.weight.device.type == "meta") == (placement == "disk")
    hfkv.patch(placed, kv=kv)
    kinds = watch_caches(placed)
    tokens = pipeline("text-generation", model=placed, tokenizer=byte_tokenizer())(
        PROMPTS[0], max_new_tokens=NEW_TOKENS, do_sample=False, return_tensors=True
    )[0]["generated_token_ids"][-NEW_TOKENS:]
    assert kinds == {"KVCache"}
    if hfkv.KVConfig.of(kv).is_lossless:
        assert tokens == stock[0].tolist()
    hfkv.unpatch(placed)
    assert torch.equal(new_tokens(placed, PROMPTS[0]), stock)


@pytest.mark.parametrize("kv", [None, "paged+page_size:4", "int8"], ids=str)
def test_threads_on_one_patched_model_do_not_mix(model, kv):
    stock = [new_tokens(model, prompt) for prompt in PROMPTS]
    hfkv.patch(model, kv=kv)
    alone = [new_tokens(model, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda index: generate(model, PROMPTS[index % 4])[0], range(16)))
    for index, tokens in enumerate(together):
        assert torch.equal(tokens, alone[index % 4])
    if kv != "int8":
        assert all(torch.equal(*pair) for pair in zip(alone, stock, strict=True))


@pytest.mark.parametrize("first", ["original", "copy"])
def test_a_deep_copy_is_patched_and_undone_on_its_own(model, first):
    stock = new_tokens(model, *PROMPTS)
    patch = hfkv.patch(model, kv="paged")
    twin = copy.deepcopy(model)
    assert twin.hfkv.model is twin
    assert twin.hfkv is not patch
    undone, kept = (model, twin) if first == "original" else (twin, model)
    hfkv.unpatch(undone)
    for one, kind in ((undone, "DynamicCache"), (kept, "KVCache")):
        tokens, cache = generate(one, *PROMPTS)
        assert type(cache).__name__ == kind
        assert torch.equal(tokens, stock)
    assert undone.config._attn_implementation == "sdpa"
    assert kept.config._attn_implementation == "hfkv"
    hfkv.unpatch(kept)
    assert kept.config._attn_implementation == "sdpa"
    assert "hfkv" not in vars(kept)
    assert torch.equal(new_tokens(kept, *PROMPTS), stock)


def test_a_model_that_shares_the_config_keeps_its_attention_and_cache(model):
    config = llama_config(**BYTES)
    patched, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    assert patched.config is other.config
    stock = new_tokens(other, *PROMPTS)
    hfkv.patch(patched, kv="int8+window:8")
    layers = [layer.self_attn.config._attn_implementation for layer in other.model.layers]
    assert {config._attn_implementation, other.config._attn_implementation, *layers} == {"sdpa"}
    tokens, cache = generate(other, *PROMPTS)
    assert type(cache).__name__ == "DynamicCache"
    assert torch.equal(tokens, stock)
    hfkv.unpatch(patched)
    assert patched.config is other.config is config
    assert all(layer.self_attn.config is config for layer in patched.model.layers)


class Collector(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("kv", LOSSLESS, ids=str)
def test_a_streamer_gets_every_token_as_it_comes(model, kv):
    stock, ours = Collector(), Collector()
    new_tokens(model, PROMPTS[0], streamer=stock)
    with hfkv.patch(model, kv=kv):
        new_tokens(model, PROMPTS[0], streamer=ours)
    assert ours.ended
    assert ours.chunks == stock.chunks
    assert len(ours.chunks) == 1 + NEW_TOKENS  # the prompt, then token by token


@pytest.mark.parametrize("kv", LOSSLESS, ids=str)
def test_stopping_criteria_stop_where_they_did(model, kv):
    wanted = new_tokens(model, PROMPTS[0])[0, 5].item()

    def stop(ids, scores, **kwargs):
        return ids[:, -1] == wanted

    stock, _ = generate(model, PROMPTS[0], stopping_criteria=[stop])
    assert stock.shape[1] < NEW_TOKENS
    with hfkv.patch(model, kv=kv):
        tokens, cache = generate(model, PROMPTS[0], stopping_criteria=[stop])
    assert torch.equal(tokens, stock)
    assert isinstance(cache, hfkv.KVCache)


@pytest.mark.parametrize("call", ["static", "no cache"])
def test_a_call_that_asks_for_another_cache_is_left_alone(model, call):
    options = {"cache_implementation": "static"} if call == "static" else {"use_cache": False}
    stock = new_tokens(model, *PROMPTS, **options)
    with hfkv.patch(model, kv="int8"):
        tokens, cache = generate(model, *PROMPTS, **options)
        assert isinstance(generate(model, *PROMPTS)[1], hfkv.KVCache)
    assert torch.equal(tokens, stock)
    assert type(cache) is (StaticCache if call == "static" else type(None))
