"""What an outsider's review of the windows found, each held by a test."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import hfkv
import hfkv.eval
from hfkv import KVCache, KVConfig, Window
from tests import brute_force
from tests.tiny import greedy, llama, llama_config, prompt
from tests.zoo import architectures, build
from tests.zoo.named import NAMED

RULES = [
    Window(64, 4),
    Window(6, 2, sink_positions="cache"),
    Window(6, 2, summary="mean", summary_pages=3, summary_page_size=4),
]


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("is_additive", [False, True])
@pytest.mark.parametrize("kind", ["packed", "right padding"])
def test_packed_texts_and_right_padding_in_a_4d_mask_are_refused(kind: str, is_additive: bool) -> None:
    model, ids = llama(), text(2, 40)
    mask = causal(40).expand(2, 1, 40, 40).clone()
    if kind == "packed":
        mask[:, :, 16:, :16] = False
    else:
        mask[1, :, 30:], mask[1, :, :, 30:] = False, False
    if is_additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    kv = "window:6+sinks:2"
    with hfkv.patch(model, kv), pytest.raises(NotImplementedError, match="packed texts"):
        model(ids, attention_mask=mask, past_key_values=KVCache(model, kv))


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("size", [6, 100])
def test_an_additive_mask_of_left_padding_is_read_whatever_it_hides_with(size: int, fill: float) -> None:
    model, ids = llama(), text(2, 30)
    real = torch.arange(30) >= torch.tensor([0, 7])[:, None]
    mask = torch.where(causal(30) & real[:, None, None], 0.0, fill)
    mask[1, :, :7] = 0.0 if fill == float("-inf") else mask[1, :, :7]  # a row of -inf is NaN in any model
    kv = KVConfig(window=Window(size, 2))
    with torch.no_grad(), hfkv.patch(model, kv):
        written = model(ids, attention_mask=mask, past_key_values=KVCache(model, kv)).logits
        plain = model(ids, attention_mask=real.long(), past_key_values=KVCache(model, kv)).logits
    torch.testing.assert_close(written[real], plain[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [6, 100])
def test_a_mask_that_says_more_than_what_is_hidden_is_refused(size: int) -> None:
    model, ids = llama(), text(1, 30)
    kv = KVConfig(window=Window(size, 2))
    distance = (torch.arange(30)[:, None] - torch.arange(30)).clamp_min(0)
    bias = torch.where(causal(30), -0.7 * distance, float("-inf"))[None, None]
    with hfkv.patch(model, kv):
        with pytest.raises(NotImplementedError, match="values between 0 and hidden"):
            model(ids, attention_mask=bias, past_key_values=KVCache(model, kv))
        with pytest.raises(TypeError, match="must be bool or additive"):
            model(ids, attention_mask=causal(30).long()[None, None], past_key_values=KVCache(model, kv))


@pytest.mark.parametrize("window", RULES[1:], ids=["cache", "summary"])
def test_a_model_cast_after_the_patch_turns_by_its_rounded_frequencies(window: Window) -> None:
    model, kv = llama(), KVConfig(window=window)
    patch = hfkv.patch(model, kv)
    before = patch.rotary
    assert patch.rotary is before
    model.to(torch.bfloat16).float()
    assert patch.rotary is not before
    hfkv.unpatch(model)
    cast = copy.deepcopy(model)
    ids = text(1, 300)
    with torch.no_grad():
        expected = brute_force.logits(cast, ids, kv)
        with hfkv.patch(model, kv) as again:
            ours = model(ids, past_key_values=KVCache(model, kv, again.rotary)).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_schedule_of_ones_own_may_be_asked_by_many_threads() -> None:
    for _ in range(5):
        window = Window(4096, schedule=lambda seen: 4096 if seen < 8192 else 2048)
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(window.lower_bound(60_000))) for _ in range(4)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [60_001 - 2048] * 4


def test_half_precision_scores_do_not_overflow() -> None:
    model = llama().half()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.k_proj.weight.data *= 40
    kv = KVConfig(window=Window(6, 2, sink_positions="cache"))
    with torch.no_grad(), hfkv.patch(model, kv):
        assert model(text(1, 30), past_key_values=KVCache(model, kv)).logits.isfinite().all()


def test_global_layers_that_are_not_the_windows_are_refused() -> None:
    model = NAMED["qwen3_next"]().model
    for window in (Window(8, global_layers=[0]), Window(8, global_heads={0: [0]})):
        with pytest.raises(ValueError, match="names layer 0, which the window is not for"):
            KVCache(model, KVConfig(window=window))
    kv = KVConfig(window=Window(8, global_layers=[0]), layers={"0": KVConfig(window=4)})
    with pytest.raises(ValueError, match="names layer 0, which the window is not for"):
        KVCache(llama_config(), kv)
    with pytest.raises(ValueError, match="says nothing of layer 0"):
        KVCache(llama_config(), "window:8+sink_positions:cache", rotary={})


@pytest.mark.parametrize("window", RULES, ids=["plain", "cache", "summary"])
@pytest.mark.parametrize("pads", [(300,), (150, 90), (399, 300)])
def test_prompts_that_are_mostly_padding(pads: tuple[int, ...], window: Window) -> None:
    model, kv = llama(), KVConfig(window=window)
    ids = text(len(pads), 400)
    mask = (torch.arange(400) >= torch.tensor(pads)[:, None]).long()
    with hfkv.patch(model, kv):
        together = greedy(model, {"input_ids": ids, "attention_mask": mask}, 70)
        for row, pad in enumerate(pads):
            alone = {"input_ids": ids[row : row + 1, pad:], "attention_mask": mask[row : row + 1, pad:]}
            assert torch.equal(together[row, pad:], greedy(model, alone, 70)[0])


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("length", range(3, 14))
def test_assigning_a_layers_own_keys_at_a_pages_edge(length: int, page_size: int) -> None:
    model = llama()
    kv = KVConfig(window=Window(1, 0, summary="mean", summary_pages=2, summary_page_size=page_size))
    with torch.no_grad(), hfkv.patch(model, kv) as patch:
        caches = [KVCache(model, kv, patch.rotary) for _ in range(2)]
        for cache in caches:
            model(text(1, length), past_key_values=cache)
            model(torch.tensor([[5]]), past_key_values=cache)
        for layer in caches[0].layers:
            layer.keys = layer.keys * 1.0
            layer.keys, layer.values = layer.keys, layer.values
        first, second = (model(torch.tensor([[7]]), past_key_values=cache).logits for cache in caches)
    assert torch.equal(first, second)
    assert caches[0].get_seq_length() == length + 2


def test_a_crop_into_the_padding_lets_it_begin_elsewhere() -> None:
    model = llama()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad(), hfkv.patch(model, "window:100"):
        cache = KVCache(model, "window:100")
        model(text(2, 20), attention_mask=mask, past_key_values=cache)
        cache.crop(-15)
        model(text(2, 3), attention_mask=mask[:, :8], past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_one_short_row_does_not_keep_the_padding_of_the_batch() -> None:
    model = llama()
    mask = torch.ones(2, 900, dtype=torch.long)
    mask[1, :890] = 0
    with torch.no_grad(), hfkv.patch(model, "window:64"):
        cache = KVCache(model, "window:64")
        model(text(2, 900), attention_mask=mask, past_key_values=cache)
        model(text(2, 1), attention_mask=torch.cat((mask, mask[:, -1:]), 1), past_key_values=cache)
    assert cache.layers[0].store.length <= 64 + 4


def test_a_forward_with_gradients_leaves_no_graph_in_the_cache() -> None:
    model = llama()
    cache = KVCache(model)
    keys: list[weakref.ref[torch.Tensor]] = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, inputs, output: keys.append(weakref.ref(output))
    )
    model(text(1, 8), past_key_values=cache)
    hook.remove()
    with torch.no_grad():
        model(text(1, 1), past_key_values=cache)
    gc.collect()
    assert len(keys) == 1
    assert keys[0]() is None
    assert copy.deepcopy(cache).get_seq_length() == 9
    loss = model(text(1, 1), past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="gradients do not flow through an hfkv cache"):
        loss.backward()


def test_configs_that_refuse_comparison_come_off() -> None:
    found = [architecture for architecture in architectures() if architecture.model_type == "gemma4"]
    if not found:
        pytest.skip("this transformers has no gemma4")
    model = build(found[0])
    before = model.config
    with hfkv.patch(model):
        pass
    assert model.config is before
    hfkv.patch(model)
    hfkv.unpatch(model)


def test_beams_of_a_padded_batch_after_a_crop_keep_their_padding() -> None:
    model, inputs = llama(), prompt(batch=2, length=20, padding=7)
    with hfkv.patch(model, "window:8"):
        expected = greedy(model, inputs, 20, num_beams=2)
        cache = KVCache(model, "window:8")
        found = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False, num_beams=2)
    assert torch.equal(expected, found)


def test_rows_that_are_left_may_have_been_padding_where_the_others_windows_moved() -> None:
    model = llama()
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :25] = 0
    ids = text(2, 31)
    with torch.no_grad(), hfkv.patch(model, "window:10"):
        cache = KVCache(model, "window:10")
        for first in range(30):
            model(ids[:, first : first + 1], attention_mask=mask[:, : first + 1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        ours = model(ids[1:, 30:], attention_mask=mask[1:], past_key_values=cache).logits
        alone = model(ids[1:, 25:], past_key_values=KVCache(model, "window:10")).logits[:, -1:]
    torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [[0, 1], [7]], ids=["all", "not there"])
def test_global_heads_that_leave_none_to_slide_are_refused_before_any_forward(heads: list[int]) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"of layer 1; it has 0-1, and at least one must slide"):
        hfkv.patch(model, KVConfig(window=Window(8, global_heads={1: heads})))


def test_a_window_or_one_config_in_the_wrong_place_says_where_it_belongs() -> None:
    model = llama()
    with pytest.raises(TypeError, match=r"write KVConfig\(window=...\) around it"):
        hfkv.patch(model, Window(8))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write \['int8'\]"):
        hfkv.eval.compare(model, torch.arange(9), "int8")
