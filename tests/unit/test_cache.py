"""KVCache and KVLayer: transformers' contract, on every combination of policies."""

import copy
import itertools

import pytest
import torch
from transformers import (
    DynamicCache,
    GemmaConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
)

import hfkv
from hfkv import KVCache, KVConfig, Window
from hfkv.cache.layers.span import ROLLBACK_MARGIN
from hfkv.stores import OffloadedStore, Store
from tests.tiny import feed, greedy, llama, llama_config, llama_for, prompt, states
from tests.unit.test_stores import CopiedBytes

CODECS = ("none", "int8", "int4", "fp8")
STORES = ("contiguous", "paged+page_size:4")
WINDOWS = ("", "+window:6+sinks:2")
PRODUCT = [
    f"{codec}{window}+{store}{offload}"
    for codec, store, window, offload in itertools.product(CODECS, STORES, WINDOWS, ("", "+offload"))
]
PRODUCT += ["k:int8+v:int4", "k:none+v:int8", "k:int4+v:none+window:6+sinks:2+paged+page_size:4+offload"]


def filled(kv: str, batch: int = 2, tokens: int = 9, **changes: object) -> KVCache:
    cache = KVCache(llama_config(**changes), kv)
    feed(cache, batch, tokens)
    return cache


@pytest.mark.smoke
@pytest.mark.parametrize("kv", PRODUCT)
def test_every_product_of_policies_generates_alike_whole_in_chunks_and_by_token(kv: str) -> None:
    model = llama_for(kv)
    with hfkv.patch(model, kv):
        inputs = prompt()
        whole = greedy(model, inputs)
        assert torch.equal(whole, greedy(model, inputs, prefill_chunk_size=4))
        assert torch.equal(whole, greedy(model, inputs, prefill_chunk_size=1))


@pytest.mark.smoke
@pytest.mark.parametrize("kv", PRODUCT)
def test_every_method_works_on_every_product(kv: str) -> None:
    cache = filled(kv)
    layer = cache.layers[0]
    keys = layer.keys.clone()
    cache.crop(-2)
    assert cache.get_seq_length() == 7
    assert torch.equal(layer.keys, keys[:, :, :-2])
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, keys[:, :, :-2].repeat_interleave(2, dim=0))
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    assert torch.equal(layer.keys[0], keys[1, :, :-2])
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert torch.equal(layer.keys, keys[[1, 0], :, :-2])
    twin = copy.deepcopy(cache)
    feed(cache, 2, 1)
    assert twin.get_seq_length() == 7
    assert torch.equal(twin.layers[0].keys, keys[[1, 0], :, :-2])
    feed(twin, 2, 3)
    assert cache.get_seq_length() == 8
    rows = list(cache)
    assert rows[0][0].shape == layer.keys.shape
    cache.activate_past_recording()
    feed(cache, 2, 5)
    cache.crop(-5)
    assert cache.get_seq_length() == 8
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes()) == (0, 0)
    assert layer.keys is None
    feed(cache, 3, 4)
    assert layer.keys.shape[0] == 3


@pytest.mark.parametrize("kv", [kv for kv in PRODUCT if "offload" not in kv])
def test_updating_token_by_token_copies_a_constant_number_of_bytes_a_token(kv: str) -> None:
    copied = []
    for count in (100, 400):
        cache = KVCache(llama_config(num_hidden_layers=1), kv)
        states = torch.randn(1, 2, 1, 16)
        with CopiedBytes() as counter:
            for _ in range(count):
                cache.layers[0].update(states, states)
        copied.append(counter.total / count)
    assert copied[1] <= 1.25 * copied[0]


@pytest.mark.parametrize("kv", ["none", "int8", "k:none+v:int8", "none+paged+page_size:4"])
def test_keys_and_values_can_be_assigned(kv: str) -> None:
    cache = filled(kv)
    layer = cache.layers[0]
    keys, values = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 4, 16)
    layer.keys, layer.values = keys, values
    assert cache.get_seq_length() == 4
    tolerance = 0 if kv.startswith("none") else 0.02
    torch.testing.assert_close(layer.keys, keys, atol=tolerance, rtol=0)
    layer.values = values * 2
    torch.testing.assert_close(layer.values, values * 2, atol=2 * tolerance, rtol=0)
    torch.testing.assert_close(layer.keys, keys, atol=tolerance * 2, rtol=0)


@pytest.mark.parametrize(("codec", "limit"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.30)])
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:4"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_held_bytes_against_bf16(codec: str, limit: float, store: str, head_dim: int) -> None:
    config = llama_config(head_dim=head_dim)
    held = {}
    for name in (codec, "none"):
        cache = KVCache(config, f"{name}+{store}")
        for layer_idx in range(2):
            states = torch.randn(2, 2, 37, head_dim, dtype=torch.bfloat16)
            cache.update(states, states, layer_idx)
        held[name] = cache.held_bytes()
    assert held["none"] == 2 * 2 * 2 * 2 * 37 * head_dim * 2
    assert held[codec] <= limit * held["none"]


@pytest.mark.parametrize("kv", PRODUCT)
def test_nbytes_is_the_sum_of_unique_storages(kv: str) -> None:
    cache = filled(kv)
    storages = {
        plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes()
        for layer in cache.kv_layers
        for plane in planes_of(layer.store)
    }
    buffers = {} if cache.offload is None else cache.offload.buffer_bytes()
    assert cache.nbytes() == sum(storages.values()) + sum(buffers.values())
    assert cache.nbytes() >= cache.held_bytes()


def planes_of(store: Store) -> list[torch.Tensor]:
    away = store.tiers.host.planes() if isinstance(store, OffloadedStore) else []
    return [*store.planes, *(segment for plane in away for segment in plane)]


@pytest.mark.parametrize("kv", ["none", "int8", "int8+paged+page_size:16", "window:64+sinks:4"])
def test_patched_generate_allocates_what_is_needed_and_no_more(kv: str) -> None:
    model = llama()
    with hfkv.patch(model, kv):
        inputs = prompt(length=200)
        out = greedy(model, inputs, 100, return_dict_in_generate=True)
    cache = out.past_key_values
    page = (cache.kv.page_size or 1) if cache.kv.store == "paged" else (16 if cache.kv.window else 1)
    token_bytes = cache.held_bytes() / cache.kv_layers[0].store.length
    assert cache.nbytes() <= 1.02 * cache.held_bytes() + page * token_bytes


def test_a_window_crop_beyond_what_is_held_raises_and_changes_nothing() -> None:
    cache = filled("none+window:6+sinks:2", tokens=30)
    feed(cache, 2, 1)
    keys = cache.layers[0].keys
    with pytest.raises(RuntimeError, match="cannot crop to 11 tokens"):
        cache.crop(-20)
    assert cache.get_seq_length() == 31
    assert torch.equal(cache.layers[0].keys, keys)
    cache.crop(-1)
    assert cache.get_seq_length() == 30
    with pytest.raises(ValueError, match="crop takes a negative number"):
        cache.crop(3)


def test_recording_does_not_hold_the_whole_prompt() -> None:
    cache = KVCache(llama_config(), "none+window:6+sinks:2")
    cache.activate_past_recording()
    feed(cache, 1, 500)
    for _ in range(3):
        feed(cache, 1, 1)
    assert cache.layers[0].store.length <= 2 + 6 + ROLLBACK_MARGIN + 3
    cache.crop(-3)
    assert cache.get_seq_length() == 500
    for layer in cache.layers:
        layer.record_past = False
    feed(cache, 1, 1)
    cache.crop(0)
    assert cache.layers[0].store.length <= 8


def test_a_sliding_model_keeps_its_window_and_takes_the_codec() -> None:
    config = MistralConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    cache = KVCache(config, "int8")
    feed(cache, 1, 20)
    feed(cache, 1, 1)
    stock = DynamicCache(config=config)
    for count in (20, 1):
        for layer_idx in range(2):
            stock.update(torch.randn(1, 2, count, 16), torch.randn(1, 2, count, 16), layer_idx)
    assert cache.is_sliding == [True, True]
    for query_length in (1, 5):
        assert cache.get_mask_sizes(query_length, 0) == stock.get_mask_sizes(query_length, 0)
    assert cache.layers[0].store.length == 6
    with pytest.raises(ValueError, match=r"no attention layer of .mistral. is left for it: each already slides"):
        KVCache(config, "window:100")


def test_layers_may_differ() -> None:
    model = llama(num_hidden_layers=4)
    kv = KVConfig("int8", layers={"0": KVConfig(), "2-3": KVConfig("int4", store="paged", page_size=4)})
    cache = KVCache(model, kv)
    greedy(model, prompt(), past_key_values=cache)
    assert [layer.codecs.name for layer in cache.layers] == ["none", "int8", "int4", "int4"]
    with pytest.raises(ValueError, match="names layer 9"):
        KVCache(model, KVConfig(layers={"9": KVConfig()}))


def test_named_caches_fix_one_policy_and_take_the_others() -> None:
    config = llama_config()
    assert hfkv.SlidingWindowCache(config, 64, sinks=2, codec="int8").kv == KVConfig("int8", window=Window(64, 2))
    assert hfkv.QuantizedCache(config).kv == KVConfig("int8")
    assert hfkv.QuantizedCache(config, "int4", offload=True).kv == KVConfig("int4", offload=True)
    assert hfkv.OffloadedCache(config, codec="fp8").kv == KVConfig("fp8", offload=True)
    assert hfkv.PagedCache(config, 32, window=64).kv == KVConfig(window=64, store="paged", page_size=32)
    with pytest.raises(TypeError, match="nbits"):
        hfkv.QuantizedCache(config, nbits=4)
    with pytest.raises(TypeError, match="PagedCache has store='paged', got store='contiguous'; leave it out"):
        hfkv.PagedCache(config, store="contiguous")
    with pytest.raises(TypeError, match="OffloadedCache has offload=True, got offload=False"):
        hfkv.OffloadedCache(config, offload=False)


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        ([(torch.zeros(1), torch.zeros(1))], TypeError, "DDP"),
        ("llama", TypeError, "a model or its config, got str"),
        (MambaConfig(num_hidden_layers=2), ValueError, "no attention heads"),
    ],
)
def test_what_is_not_a_model_with_attention_is_refused(argument: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        KVCache(argument)


def test_a_bad_kv_is_refused() -> None:
    with pytest.raises(TypeError, match="kv must be a KVConfig"):
        KVCache(llama_config(), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown word 'int9'"):
        KVCache(llama_config(), "int9")


def test_a_cache_from_another_model_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="built for 1 layers and was given keys of layer 1"):
        greedy(model, prompt(), past_key_values=KVCache(llama_config(num_hidden_layers=1)))
    config = GemmaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    with hfkv.patch(model), pytest.raises(ValueError, match="'gemma' model of 2 layers"):
        greedy(model, prompt(), past_key_values=KVCache(config))
    used = KVCache(model)
    greedy(model, prompt(), past_key_values=used)
    other = llama(num_key_value_heads=4)
    with pytest.raises(ValueError, match="A cache serves one batch of one model"):
        other(torch.tensor([[5], [6]]), past_key_values=used)


def test_a_batch_size_changed_midway_is_refused() -> None:
    model = llama()
    cache = KVCache(model)
    model(**prompt(batch=2), past_key_values=cache)
    with pytest.raises(ValueError, match="holds keys of batch 2"):
        model(torch.tensor([[5], [6], [7]]), past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_a_dtype_changed_midway_is_refused() -> None:
    cache = filled("none")
    states = torch.randn(2, 2, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds keys of torch.float32 on cpu and was given torch.bfloat16"):
        cache.update(states, states, 0)


def test_a_cache_never_knows_its_tokens() -> None:
    assert filled("none").holds_tokens is None


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


def test_keys_and_values_keep_their_own_dtypes() -> None:
    cache = KVCache(llama_config())
    value = states()
    key_view, value_view = cache.update(states().bfloat16(), value, 0)
    assert (key_view.dtype, value_view.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(value_view + 0, value)
