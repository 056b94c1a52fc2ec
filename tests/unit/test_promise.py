"""A promise of the loss as a word and a field, and configs as JSON."""

from __future__ import annotations

import copy
import pickle

import pytest

import hfkv
from hfkv import KVCache, KVConfig, Reuse, Window
from tests.tiny import llama_config

SHARES = [0.005, 0.01, 0.1, 1e-6, 0.123456789012345678, 0.3, 5e-5, 0.999]


@pytest.mark.parametrize("share", SHARES)
def test_a_promise_is_a_word(share: float) -> None:
    kv = KVConfig(loss_change=share, window=Window(64), store="paged")
    assert KVConfig.parse(str(kv)) == kv
    assert pickle.loads(pickle.dumps(kv)) == copy.deepcopy(kv) == kv
    assert len({kv, KVConfig(loss_change=0.5), KVConfig(window=Window(64), store="paged")}) == 3
    assert not KVConfig(loss_change=share).is_lossless


def test_the_word_is_a_percentage_and_alone_that_of_a_store() -> None:
    assert str(KVConfig(loss_change=0.005)) == "auto:0.5%"
    assert KVConfig.parse("auto:0.5%+auto") == KVConfig(loss_change=0.005)
    assert KVConfig.parse("auto") == KVConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("auto:0.5", "auto takes a percentage such as 0.5%, got '0.5'"),
        ("auto:", "auto takes a percentage"),
        ("auto:-1%", "auto takes a percentage"),
        ("auto:0%", "a share from 1e-06 to below 1, got 0"),
        ("auto:100%", "to below 1, got 1.0"),
        ("auto:0.5%+auto:1%", "gives loss_change twice"),
        ("int8+auto:0.5%", "leave codec and layers out, or loss_change; got codec='int8'"),
        ("auto:0.5%+int9", "allowed: none, int8, int4, fp8, .*auto:PERCENT"),
    ],
)
def test_a_bad_promise_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVConfig.parse(text)


def test_a_bad_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"KVConfig.loss_change must be a share such as 0.005 .*, got '0.5%'"):
        KVConfig(loss_change="0.5%")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for all layers together"):
        KVConfig(layers={"0": KVConfig(loss_change=0.1)})
    with pytest.raises(ValueError, match="and 1 layers"):
        KVConfig(loss_change=0.1, layers={"0": KVConfig()})


def test_a_cache_takes_no_promise() -> None:
    with pytest.raises(ValueError, match=r"'auto:0.5%' is a promise .* hfkv.patch\(model, kv=...\) .*for_fidelity"):
        KVCache(llama_config(), "auto:0.5%")
    with pytest.raises(ValueError, match="is a promise"):
        hfkv.memory_plan("tiny", "1GiB", 100, kv="auto:0.5%", bandwidth=1e12, bus=1e10)


@pytest.mark.parametrize(
    "kv",
    [
        KVConfig(),
        KVConfig(loss_change=0.005, window=9, reuse=Reuse("1GiB", salt="tenant")),
        KVConfig("int4", store="paged", page_size=4, offload=True, device_budget="3MiB"),
        KVConfig("int8", layers={"0-1": KVConfig(), "5": KVConfig("int4", window=Window(64, global_heads={}))}),
        KVConfig(window=Window(64, sink_positions="cache", global_layers=(3, 0), global_heads={2: [1, 0], 5: (3,)})),
    ],
)
def test_json_says_all_of_a_config(kv: KVConfig) -> None:
    assert KVConfig.from_json(kv.to_json()) == kv


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8", "takes what to_json wrote"),
        ("[1]", "it is no object"),
        ("{}", "the config must be an object of"),
        ('{"reuse": {"bytes": 1}}', "takes what to_json wrote"),
        (KVConfig().to_json().replace("none", "int9"), "the codec 'int9', which is not registered here"),
        (KVConfig().to_json().replace("false", "3"), "KVConfig.offload must be True or False, got 3"),
    ],
)
def test_json_that_is_no_config_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVConfig.from_json(text)
    with pytest.raises(TypeError, match=r"KVConfig.from_json takes a str, got dict"):
        KVConfig.from_json({})  # type: ignore[arg-type]


def test_a_schedule_of_ones_own_has_no_json() -> None:
    with pytest.raises(ValueError, match="a callable of your own, which no file can hold"):
        KVConfig(window=Window(9, schedule=lambda seen: 9)).to_json()
