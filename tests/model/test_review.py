"""Regressions: each of these was wrong once."""

import io
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DynamicCache,
    EncoderDecoderModel,
    Lfm2Config,
    MistralConfig,
    StoppingCriteriaList,
)

import hfkv
from hfkv import KVCache, KVConfig
from hfkv.cache.view import KVView
from tests.tiny import greedy, llama, llama_config, llama_for, prompt
from tests.zoo import NAMED, generate


def states(batch: int = 1, tokens: int = 5) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 16)


def feed(cache: KVCache, batch: int, tokens: int) -> None:
    for layer_idx in range(len(cache.layers)):
        cache.update(states(batch, tokens), states(batch, tokens), layer_idx)


@pytest.mark.parametrize("kv", ["none", "none+window:8+sinks:2"])
def test_assigning_what_is_held_keeps_the_positions(kv: str) -> None:
    cache = KVCache(llama_config(), kv)
    for _ in range(6):
        feed(cache, 4, 5)
    layer = cache.layers[0]
    keys = layer.keys.clone()
    layer.keys, layer.values = layer.keys, layer.values
    assert cache.get_seq_length() == 30
    layer.keys, layer.values = layer.keys[[0, 2]], layer.values[[0, 2]]
    assert torch.equal(layer.keys, keys[[0, 2]])
    assert cache.get_seq_length() == 30
    if cache.kv.window:
        with pytest.raises(ValueError, match="their positions are unknown"):
            layer.keys, layer.values = states(2, 3), states(2, 3)


def test_half_an_assignment_does_not_outlive_a_reset() -> None:
    cache = KVCache(llama_config())
    feed(cache, 1, 5)
    layer = cache.layers[0]
    layer.keys = states(1, 3)
    with pytest.raises(RuntimeError, match="keys were assigned to this layer without the other half"):
        layer.update(states(), states())
    cache.reset()
    feed(cache, 1, 5)
    assert layer.keys.shape[2] == 5
    layer.keys = states(1, 3)
    with pytest.raises(ValueError, match="differ in batch or tokens"):
        layer.values = states(1, 4)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("kind", ["holes", "bidirectional"])
def test_a_window_refuses_masks_that_are_not_left_padding(kind: str) -> None:
    model, count = llama(), 12
    mask = torch.ones(count, count, dtype=torch.bool)
    if kind == "holes":
        mask = mask.tril()
        mask[6:11, :3] = False
    kv = "window:5+sinks:1"
    with hfkv.patch(model, kv), pytest.raises(NotImplementedError, match="not the causal one of a left-padded batch"):
        model(prompt(1, count)["input_ids"], attention_mask=mask[None, None], past_key_values=KVCache(model, kv))


@pytest.mark.parametrize("kv", ["none", "none+paged", "none+offload", "int8", "window:5"])
def test_items_of_a_view_cannot_be_set(kv: str) -> None:
    key, _ = KVCache(llama_config(), kv).update(states(), states(), 0)
    with pytest.raises(RuntimeError, match="would be lost"):
        key[:, :, 0] = 7.0
    for method in ("share_memory_", "apply_"):
        with pytest.raises(RuntimeError, match="would be lost"):
            getattr(key, method)(abs)


def test_a_view_can_leave_as_a_plain_tensor() -> None:
    key, _ = KVCache(llama_config(), "int8").update(states(), states(), 0)
    assert isinstance(key, KVView)
    file = io.BytesIO()
    torch.save(key, file)
    file.seek(0)
    for plain in (torch.load(file), torch.from_numpy(key.numpy()), torch.tensor(key.tolist())):
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, key + 0)


@pytest.mark.parametrize("kv", ["none", "none+window:6+sinks:2"])
def test_keys_that_were_read_do_not_change_with_the_cache(kv: str) -> None:
    cache = KVCache(llama_config(), kv)
    feed(cache, 1, 5)
    feed(cache, 1, 1)
    kept = cache.layers[0].keys
    before = kept.clone()
    cache.crop(-1)
    for _ in range(9):
        feed(cache, 1, 1)
    assert torch.equal(kept, before)


def test_a_trained_prefix_in_the_cache_is_not_silently_left_out_of_the_backward_pass() -> None:
    model = llama()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    prefix = torch.randn(1, 2, 3, 16, requires_grad=True)
    cache = KVCache(model)
    for layer_idx in range(2):
        cache.update(prefix, prefix, layer_idx)
    logits = model(torch.tensor([[5, 6]]), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="gradients do not flow through an hfkv cache"):
        logits.sum().backward()


@pytest.mark.parametrize(
    "kv", ["window:16+sinks:8", "window:100+sinks:50", "int8+window:16+sinks:15+paged+page_size:4"]
)
def test_chunks_smaller_than_the_sinks(kv: str) -> None:
    model, inputs = llama_for(kv), prompt(length=20)
    with hfkv.patch(model, kv):
        whole = greedy(model, inputs)
        for chunk in (1, 2, 7):
            assert torch.equal(whole, greedy(model, inputs, prefill_chunk_size=chunk))


def test_a_window_is_refused_where_positions_are_a_bias() -> None:
    sample = NAMED["t5"]()
    with hfkv.patch(sample.model, "window:8"), pytest.raises(NotImplementedError, match="adds a position bias"):
        generate(sample.model, sample.inputs)


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


def test_a_length_that_cannot_be_reserved_is_grown_into(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: torch.ones(len(ids), dtype=torch.bool)])
    for kv in ("none", "paged"):
        with hfkv.patch(model, kv):
            assert greedy(model, prompt(), 10**10, stopping_criteria=stop).shape == (2, 10)
        assert "no room to reserve" in caplog.text
        caplog.clear()


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


def test_a_crop_a_hybrid_cannot_do_leaves_our_layers_whole() -> None:
    config = Lfm2Config(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["full_attention", "conv"] * 2,
    )
    cache = KVCache(config)
    for layer in cache.kv_layers:
        layer.update(states(1, 9), states(1, 9))
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.kv_layers] == [9, 9]


def test_overrides_that_cannot_hold_raise() -> None:
    config = MistralConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, sliding_window=8)
    with pytest.raises(ValueError, match="gives layer 0 a window, but it slides over 8 tokens already"):
        KVCache(config, KVConfig(layers={"0": KVConfig(window=3)}))
    with pytest.raises(ValueError, match="names layer 0, which stays transformers' own"):
        KVCache(NAMED["qwen3_next"]().model, KVConfig(layers={"0": KVConfig("int8")}))
    assert KVConfig(layers={"0-99999999999": KVConfig()}).last_named_layer == 99999999999


def test_an_assistant_that_exits_early_under_overrides() -> None:
    model = llama(num_hidden_layers=4)
    kv = KVConfig(layers={"0": KVConfig(), "1-3": KVConfig(store="paged", page_size=4)})
    expected = greedy(model, prompt(batch=1))
    with hfkv.patch(model, kv):
        assert torch.equal(greedy(model, prompt(batch=1), assistant_early_exit=2), expected)


@pytest.mark.parametrize(
    ("kv", "batch", "tokens", "keep"),
    [("paged", 16, 600, [0]), ("none", 16, 600, [0]), ("paged", 8, 600, [0] * 8), ("window:500+paged", 1, 2000, [0])],
)
def test_memory_follows_what_is_held(kv: str, batch: int, tokens: int, keep: list[int]) -> None:
    cache = KVCache(llama_config(), kv)
    feed(cache, batch, tokens)
    cache.batch_select_indices(torch.tensor(keep))
    feed(cache, len(keep), 1)
    layer = cache.kv_layers[0]
    row = cache.held_bytes() / layer.store.length / len(set(keep))
    page = getattr(layer.store, "page_size", 0)
    assert cache.nbytes() <= 1.3 * cache.held_bytes() + 2 * len(keep) * page * row


def test_a_reset_forgets_the_reservation() -> None:
    cache = KVCache(llama_config())
    cache.reserve(100_000)
    feed(cache, 1, 5)
    cache.reset()
    feed(cache, 16, 5)
    assert cache.nbytes() == cache.held_bytes()


def test_beams_share_pages() -> None:
    model, held = llama(), {}
    for kv in ("none", "paged+page_size:16"):
        with hfkv.patch(model, kv):
            options = {"num_beams": 8, "return_dict_in_generate": True}
            held[kv] = greedy(model, prompt(1, 300), 100, **options).past_key_values.nbytes()
    assert held["paged+page_size:16"] < 0.35 * held["none"]


@pytest.mark.parametrize("kv", ["none", "paged"])
@pytest.mark.parametrize(
    "index", [torch.tensor([-1]), [0, 1], slice(1, 3), torch.tensor([True, False, True, False])], ids=str
)
def test_rows_are_selected_as_tensors_are_indexed(kv: str, index: Any) -> None:
    cache = KVCache(llama_config(), kv)
    feed(cache, 4, 5)
    keys = cache.layers[0].keys
    cache.batch_select_indices(index)
    assert torch.equal(cache.layers[0].keys, keys[index])
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([9]))


def test_keys_and_values_keep_their_own_dtypes() -> None:
    cache = KVCache(llama_config())
    value = states()
    key_view, value_view = cache.update(states().bfloat16(), value, 0)
    assert (key_view.dtype, value_view.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(value_view + 0, value)


def test_an_explicit_cache_of_a_model_that_shares_layers_fits() -> None:
    model = llama()
    stock = DynamicCache(config=model.config)
    with hfkv.patch(model):
        cache = KVCache(model)
        assert len(cache.layers) == len(stock.layers)
        greedy(model, prompt(), past_key_values=cache)
