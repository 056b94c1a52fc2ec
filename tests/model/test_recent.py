"""Recent tokens in more bits than the rest: against brute force, and as every other cache in all that caches do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, Gemma3TextConfig, MistralConfig

import hfkv
from hfkv import KVCache, KVConfig, Recent
from hfkv.attention.masks import CausalMask
from hfkv.attention.recent import recent_attention
from hfkv.attention.recent_step import quick_recent_attention
from hfkv.cache.layers.recent import RecentLayer, RecentTokens
from hfkv.codecs import Codecs
from hfkv.codecs.key_mean import KeyMean
from hfkv.codecs.waves import Waves
from hfkv.kernels.inputs import Scoring
from hfkv.kernels.placed_mean import PlacedMean
from tests.brute_force import one_head_in_two_forms
from tests.tiny import greedy, llama, llama_config, llama_for, prompt, text
from tests.windowed import LENGTH, PADS, SPLITS, assert_ways_agree, error, model_of, through_cache

STORES = ["contiguous", "paged+page_size:4", "paged+page_size:16+offload"]


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("recent", ["1", "7+recent_sinks:0", "60:k:none/v:int8", "200"])
@pytest.mark.parametrize("codec", ["int3", "k:int4+v:int2"])
def test_logits_equal_brute_force(codec: str, recent: str, padding: str, store: str, split: str) -> None:
    # In float64, see tests.model.test_window.
    assert error("llama", KVConfig.parse(f"{codec}+recent:{recent}+{store}"), padding, split, torch.float64) <= 1e-5


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcap_sink_logits_and_layers_that_slide_by_themselves(name: str, split: str) -> None:
    assert error(name, KVConfig.parse("int2+recent:9:none+recent_sinks:2"), "ragged", split) <= 1e-5


def filled(
    kv: str,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: list[int],
    pads: tuple[int, ...] | None = None,
    mean: KeyMean | None = None,
) -> tuple[RecentLayer, Any]:
    """A layer that some tokens came to, and what it shows."""
    layer = RecentLayer(KVConfig.parse(kv), mean)
    layer.reserve(keys.shape[2])
    for leaf in layer.leaves if mean is not None else ():
        leaf.begin_rows(pads or (), pads or ())
    for k, v in zip(keys.split(lengths, dim=2), values.split(lengths, dim=2), strict=True):
        shown = layer.update(k, v)
        if pads is not None:
            shown[0].held.padding.learn(pads, layer.get_seq_length() - k.shape[2])  # as the attention does
    return layer, shown[0].held


def as_read(codec: str, keys: torch.Tensor, values: torch.Tensor, mean: KeyMean | None) -> list[torch.Tensor]:
    """Keys and values as a codec gives them back, each row of `PADS["ragged"]` less its mean meanwhile; float64."""
    codecs, off = Codecs.named(codec), torch.zeros_like(keys)
    if mean is not None and codecs.key.takes_mean:
        off = PlacedMean(mean, tuple(-pad for pad in PADS["ragged"])).turned(0, LENGTH)
    read = ((codecs.key, keys, off), (codecs.value, values, torch.zeros_like(values)))
    return [its.decode(its.encode(x - less), 32, torch.float32).double() + less for its, x, less in read]


@pytest.mark.pairwise
@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("num_queries", [1, 5, 40, 90])
@pytest.mark.parametrize("recent", ["7:int8+recent_sinks:2", "20:none", "40:k:none/v:fp8", "9:k:int8/v:int4"])
@pytest.mark.parametrize("codec", ["int2+paged+page_size:8", "k:int4+v:int3", "int4"])
def test_kernels_read_each_token_in_the_form_it_has_for_the_query(
    codec: str, recent: str, num_queries: int, with_mean: bool
) -> None:
    torch.manual_seed(2)
    mean = KeyMean(torch.randn(2, 32), Waves(0.5 ** torch.arange(16), False, 32)) if with_mean else None
    kv = KVConfig.parse(f"{codec}+recent:{recent}")
    keys, values = (torch.randn(3, 2, LENGTH, 32) for _ in range(2))
    query, logits = torch.randn(3, 6, num_queries, 32), torch.randn(6)
    scoring = Scoring(0.3, softcap=9.0, sink_logits=logits)
    lengths = [LENGTH] if num_queries == LENGTH else [LENGTH - num_queries, num_queries]
    pads = PADS["ragged"]
    _, tokens = filled(str(kv), keys, values, lengths, pads, mean)
    assert isinstance(tokens, RecentTokens)
    output, weights = recent_attention(query, tokens, pads, scoring)
    assert weights is None
    forms = [as_read(name, keys, values, mean) for name in (kv.codec, kv.recent.codec)]
    for row, pad in enumerate(pads):
        first = max(LENGTH - num_queries, pad)  # before it, queries are of padding
        for head in range(6):
            q = torch.zeros(LENGTH - pad, 32, dtype=torch.float64)
            q[first - pad :] = query[row, head, first - LENGTH :]
            coarse, fine = ([part[row, head // 3, pad:] for part in form] for form in forms)
            expected = one_head_in_two_forms(q, coarse, fine, kv.recent, 0.3, 9.0, logits[head].double())
            found = output[row, head, first - LENGTH :]
            assert (found - expected[first - pad :]).abs().max() <= 2e-5 * values.abs().max()


@pytest.mark.parametrize("kv", ["int2+recent:16+recent_sinks:3", "k:int4+v:int3+recent:16:fp8+paged+page_size:4"])
def test_what_is_held_is_the_same_bits_however_tokens_come(kv: str) -> None:
    torch.manual_seed(3)
    keys, values = (torch.randn(2, 2, LENGTH, 32) for _ in range(2))
    layers = [filled(kv, keys, values, lengths)[0] for lengths in ([LENGTH, 0], [40, 7, 43], [1] * LENGTH)]
    for layer in layers:  # a window lets go when the next token comes
        layer.update(keys[:, :, :1], values[:, :, :1])
    for part in range(2):
        first, *others = (layer.leaves[part].contents() for layer in layers)
        assert first.tokens[0].shape[2] == (LENGTH + 1, 16)[part]
        for other in others:
            planes = zip((*first.tokens, *first.slots), (*other.tokens, *other.slots), strict=True)
            assert all(torch.equal(one, its) for one, its in planes)


def test_a_text_within_the_recent_tokens_is_read_as_in_their_codec() -> None:
    model = llama()
    inputs = prompt(length=20, padding=4)
    with hfkv.patch(model, "int8"):
        expected = greedy(model, inputs, 12)
    with hfkv.patch(model, "int2+recent:28:int8"):
        assert torch.equal(greedy(model, inputs, 12), expected)  # 31 tokens: 28 and the sinks
        assert not torch.equal(greedy(model, inputs, 60), greedy(llama(), inputs, 60))


@pytest.mark.parametrize(
    "kv",
    [
        "int4+recent:8:int8+recent_sinks:2",
        pytest.param("int3+recent:8+paged+page_size:4+offload", marks=pytest.mark.slow),
    ],
)
def test_every_mode_of_generate(kv: str) -> None:
    model = llama_for(kv)
    inputs = prompt(batch=1)
    with hfkv.patch(model, kv):
        assert_ways_agree(model, llama_for(kv, num_hidden_layers=2), kv, inputs)
        padded = prompt(batch=2, length=30, padding=13)
        together = greedy(model, padded, 20)
        for row, pad in ((0, 13), (1, 0)):
            alone = {name: tensor[row : row + 1, pad:] for name, tensor in padded.items()}
            assert torch.equal(together[row : row + 1, pad:], greedy(model, alone, 20))
        samples = []
        for _ in range(2):
            torch.manual_seed(5)
            samples.append(model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=30))
        assert torch.equal(*samples)
        assert len(set(map(tuple, samples[0].tolist()))) > 1


def test_second_turns_forks_crops_and_rows() -> None:
    kv = "int4+recent:8:int8"
    model = llama_for(kv)
    ids = text(3, 50)
    with torch.no_grad(), hfkv.patch(model, kv):
        whole = model(ids, past_key_values=KVCache(model, kv)).logits
        cache = KVCache(model, kv)
        model(ids[:, :30], past_key_values=cache)
        fork, rows = cache.fork(), cache.fork(2)
        rows.batch_select_indices(torch.tensor([5, 0]))
        picked = model(ids[[2, 0], 30:], past_key_values=rows).logits
        assert torch.allclose(picked, whole[[2, 0], 30:], atol=1e-9)
        model(ids[:, 35:40], past_key_values=fork)
        fork.crop(-5)
        assert torch.allclose(model(ids[:, 30:], past_key_values=fork).logits, whole[:, 30:], atol=1e-9)
        assert torch.allclose(model(ids[:, 30:], past_key_values=cache).logits, whole[:, 30:], atol=1e-9)
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(RuntimeError, match="cannot crop to 20 tokens: the window has dropped tokens"):
            cache.crop(-31)
        assert [leaf.get_seq_length() for leaf in cache.leaves] == [51] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_as_the_window_does(dtype: torch.dtype) -> None:
    kv = KVConfig.parse("int4+recent:30:int8")
    expected = through_cache(model_of("llama"), kv, "ragged", LENGTH)
    real = torch.arange(LENGTH) >= torch.tensor(PADS["ragged"])[:, None]

    def wrong(config: KVConfig, standard: torch.Tensor) -> float:
        ours = through_cache(model_of("llama", dtype), config, "ragged", 30).float()
        return float((ours - standard)[real].norm() / standard[real].norm())

    alone = KVConfig.parse("int4")
    ours, theirs = wrong(kv, expected), wrong(alone, through_cache(model_of("llama"), alone, "ragged", LENGTH))
    assert 0 < ours <= 2 * theirs


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_autocast_and_weights() -> None:
    kv = "int4+recent:8:int8"
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with hfkv.patch(model, kv):
        assert greedy(model, prompt(length=20), 30).shape == (2, 50)
        with torch.autocast("cpu", torch.bfloat16):
            assert greedy(model, prompt(length=20), 30).shape == (2, 50)
        with torch.no_grad():
            cache = KVCache(model, kv)
            found = model(text(2, 40), past_key_values=cache, output_attentions=True)
            plain = model(text(2, 40), past_key_values=KVCache(model, kv))
    assert torch.allclose(found.logits, plain.logits, atol=0.05)
    assert torch.allclose(found.attentions[0].sum(-1), torch.ones(2, 4, 40), atol=1e-5)


def test_gradients_are_refused() -> None:
    model = llama()
    with hfkv.patch(model, "int4+recent:8:int8"):
        logits = model(text(1, 40), past_key_values=KVCache(model, "int4+recent:8:int8")).logits
        with pytest.raises(RuntimeError, match="gradients do not flow"):
            logits.sum().backward()


def test_only_our_attention_reads_it() -> None:
    model, kv = llama(attn_implementation="sdpa"), "int2+recent:8"
    for length in (5, 40):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r'the "hfkv" attention|hfkv\.patch'):
            model(text(1, length), past_key_values=KVCache(model, kv))
    layer, _ = filled(kv, torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), [40])
    with pytest.raises(RuntimeError, match="recent: which form of a token is read depends on the query"):
        _ = layer.keys
    with pytest.raises(RuntimeError, match="such a layer cannot be assigned"):
        layer.values = torch.zeros(1)
    assert "recent" in layer.graph_refusal()


def test_layers_that_cannot_have_it() -> None:
    latents = DeepseekV3Config(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"layer 0 holds latents \(MLA\), .* leave recent out"):
        KVCache(latents, "int4+recent:8:int8")
    with pytest.raises(ValueError, match=r"each slides over tokens of its own, .* leave recent out, and take int8"):
        KVCache(MistralConfig(sliding_window=6, num_hidden_layers=2), "int4+recent:8:int8")
    mixed = KVCache(Gemma3TextConfig(sliding_window=6, num_hidden_layers=6), "int4+recent:8:int8")
    assert [leaf.kv.codec for leaf in mixed.leaves] == ["int8"] * 5 + ["int4", "int8"]
    own = KVConfig("int2", recent=Recent(8), layers={"0": KVConfig("int8")})
    assert [type(layer).__name__ for layer in KVCache(llama_config(), own).layers] == ["KVLayer", "RecentLayer"]


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pads", [(0, 0), (3, 31)])
def test_a_step_is_attended_to_as_each_layer_by_itself_would_be(
    pads: tuple[int, ...], dtype: torch.dtype, store: str, with_means: bool
) -> None:
    torch.manual_seed(4)
    waves = Waves(0.5 ** torch.arange(8), False, 16)
    means = {layer: KeyMean(torch.randn(2, 16), waves) for layer in range(3)} if with_means else None
    kv = f"k:int4+v:int2+recent:9:k:int4/v:int8+recent_sinks:2+{store}"
    cache = KVCache(llama_config(num_hidden_layers=3), kv, key_means=means)
    for leaf in cache.leaves:
        leaf.begin_rows(pads, pads)
    cache.reserve(60)
    seen, quick = 0, 0
    for count in (30, *[1] * 5, 4, *[1] * 5):
        seen += count
        is_real = torch.arange(seen) >= torch.tensor(pads)[:, None]
        mask = CausalMask(2, count, seen, is_real if any(pads) else None, torch.device("cpu"))
        for layer in range(3):
            states = [torch.randn(2, 2, count, 16, dtype=dtype) for _ in range(2)]
            key, value = cache.update(*states, layer)
            query = torch.randn(2, 6, count, 16, dtype=dtype)
            now = tuple(min(pad, seen) for pad in pads)
            key.held.padding.learn(now, seen - count)
            found = quick_recent_attention(query, key, value, mask, 0.3)
            if found is None:  # the first forward, and where pages are new or dropped
                continue
            quick += 1
            expected = recent_attention(query, key.held, now, Scoring(0.3))[0].transpose(1, 2)
            assert torch.allclose(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert quick == (27 if "paged" in store else 33)
