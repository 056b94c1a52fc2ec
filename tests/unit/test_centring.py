"""The mean of keys in layers, files and shared prefixes: bits, not tolerances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hfkv
from hfkv import KVCache, KVConfig
from hfkv.cache.layers.layer import KVLayer
from hfkv.codecs.key_mean import KeyMean
from hfkv.codecs.waves import Waves
from tests.tiny import greedy, llama, prompt

HEADS, WIDTH = 2, 16
LOSSY = ["int4", "int3", "int2", "k:int4+v:none"]


def mean() -> KeyMean:
    torch.manual_seed(5)
    return KeyMean(3 * torch.randn(HEADS, WIDTH), Waves(1 / 100 ** (torch.arange(8).double() / 8), False, WIDTH))


def layer(kv: str, origins: tuple[int, ...] = ()) -> KVLayer:
    made = KVLayer(KVConfig.parse(kv), mean=mean())
    if origins:
        made.begin_rows(origins, origins)
    return made


def states(batch: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    keys, values = torch.randn(2, batch, HEADS, count, WIDTH).unbind()
    return keys.to(dtype), values.to(dtype)


def planes(made: KVLayer) -> list[torch.Tensor]:
    return [plane.view(torch.uint8) for plane in made.store.read()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", LOSSY)
def test_codes_are_the_same_whole_in_chunks_and_one_by_one(kv: str, dtype: torch.dtype) -> None:
    keys, values = states(2, 150, dtype)
    whole = layer(kv)
    whole.update(keys, values)
    for size in (1, 7, 64):
        cut = layer(kv)
        for key, value in zip(keys.split(size, 2), values.split(size, 2), strict=True):
            cut.update(key, value)
        assert all(torch.equal(*pair) for pair in zip(planes(cut), planes(whole), strict=True))


@pytest.mark.parametrize("kv", LOSSY)
def test_a_padded_row_has_the_codes_that_it_has_alone(kv: str) -> None:
    keys, values = states(1, 40)
    alone = layer(kv)
    alone.update(keys, values)
    pad = torch.randn(1, HEADS, 9, WIDTH)
    both = layer(kv, (9, 0))
    both.update(*(torch.cat((torch.cat((pad, x), 2), torch.cat((x, pad), 2))) for x in (keys, values)))
    for ours, its in zip(planes(both), planes(alone), strict=True):
        assert torch.equal(ours[:1, :, 9:], its)
        assert torch.equal(ours[1:, :, :40], its)


def test_rows_take_their_positions_along() -> None:
    keys, values = states(3, 30)
    made = layer("int4", (0, 5, 11))
    made.update(keys, values)
    before = made.keys
    forked = made.fork(2)
    assert torch.equal(forked.keys, before.repeat_interleave(2, 0))
    made.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(made.keys, before[[2, 0, 0]])
    made.crop(-3)
    assert torch.equal(made.keys, before[[2, 0, 0], :, :27])


def test_assigned_keys_are_written_less_their_mean_too() -> None:
    keys, values = states(2, 30)
    made, assigned = layer("int4", (0, 4)), layer("int4")
    made.update(keys, values)
    before = planes(made)
    made.keys, made.values = keys, values
    assert all(torch.equal(*pair) for pair in zip(planes(made), before, strict=True))
    assigned.keys = keys
    assigned.values = values
    whole = layer("int4")
    whole.update(keys, values)
    assert torch.equal(assigned.keys, whole.keys)


def test_int8_and_key_mean_off_take_nothing_off() -> None:
    assert layer("int8").mean is None
    assert layer("int4+key_mean:off").mean is None
    assert layer("k:int8+v:int4").mean is None


@pytest.mark.parametrize("kv", ["int4", "int2+paged", "int4+window:12+sinks:2", "k:int4+v:int8"])
def test_a_file_brings_its_means_along(kv: str, tmp_path: Path) -> None:
    model, inputs = llama(), prompt(2, 20, padding=4)
    with hfkv.patch(model, kv, calibration=torch.arange(5, 90)):
        cache = model.hfkv.new_cache()
        ids = greedy(model, inputs, past_key_values=cache)
        cache.save(tmp_path / "cache")
        longer = {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1),
        }
        expected = greedy(model, longer, past_key_values=cache)
    loaded = KVCache.load(tmp_path / "cache", model)
    assert loaded.takes_mean
    for ours, theirs in zip(loaded.leaves, cache.leaves, strict=True):
        assert torch.equal(ours.mean.vector, theirs.mean.vector)
        assert ours.span.padding.origins == theirs.span.padding.origins
    with hfkv.patch(model, kv):  # whose own means are others
        assert torch.equal(greedy(model, longer, past_key_values=loaded), expected)
    plain = KVCache(model, kv)
    greedy(model, inputs, past_key_values=plain) if "window" not in kv else plain.layers[0].update(*states(2, 20), 0)
    if "window" not in kv:
        plain.save(tmp_path / "plain", model)
        assert not KVCache.load(tmp_path / "plain", model).takes_mean


def test_prefixes_are_shared_under_their_means() -> None:
    model, inputs = llama(), prompt(1, 40)
    with hfkv.patch(model, "int4+paged+page_size:8+reuse") as handle:
        first = greedy(model, inputs)
        assert torch.equal(greedy(model, inputs), first)
        assert handle.reuse_stats().tokens_reused > 0
        padded = {name: torch.nn.functional.pad(given, (3, 0)) for name, given in inputs.items()}
        assert torch.equal(greedy(model, padded)[:, 3:], first)
        roots = {handle.root(fingerprint) for fingerprint in [hfkv.models.fingerprint.fingerprint_of(model)]}
    with hfkv.patch(model, "int4+paged+page_size:8+reuse", calibration=torch.arange(5, 90)) as handle:
        assert handle.root(hfkv.models.fingerprint.fingerprint_of(model)) not in roots
