"""KVConfig and Window: what is refused, and with which words."""

import copy
import pickle

import pytest
from transformers import (
    MistralConfig,
)

import hfkv
from hfkv import KVCache, KVConfig, Recent, Window
from tests.tiny import llama_config
from tests.zoo import NAMED


def test_the_string_form_says_the_same_as_the_fields() -> None:
    assert KVConfig.parse("int8+window:4096+sinks:8+offload+paged+page_size:64") == KVConfig(
        codec="int8", window=Window(4096, 8), offload=True, store="paged", page_size=64
    )
    assert KVConfig.parse("none") == KVConfig()
    assert KVConfig(window=100).window == Window(100, 4)
    assert KVConfig(window=2).window == Window(2, 4)
    assert KVConfig.parse("window:dynamic").window == Window(schedule="dynamic")


def test_keys_and_values_may_have_codecs_of_their_own() -> None:
    kv = KVConfig.parse("v:int4+window:8+k:int8")
    assert kv == KVConfig("v:int4+k:int8", window=8) == KVConfig("k:int8+v:int4", window=8)
    assert kv.codec == "k:int8+v:int4"
    assert KVConfig.parse("k:int8+v:int8") == KVConfig("k:int8+v:int8") == KVConfig("int8")
    assert KVConfig("k:none+v:none").is_lossless
    assert not KVConfig("k:none+v:int8").is_lossless
    assert not KVConfig(layers={"0": KVConfig("k:int8+v:none")}).is_lossless
    assert hfkv.QuantizedCache(llama_config(), "k:int8+v:int4").kv == KVConfig("k:int8+v:int4")


@pytest.mark.parametrize(
    "kv",
    [
        KVConfig(),
        KVConfig("int4", window=Window(9, 0)),
        KVConfig("fp8", store="paged", page_size=4, offload=True),
        KVConfig("k:int8+v:int4", window=Window(9, 2), store="paged"),
        KVConfig(store="contiguous"),
        KVConfig(window=Window(64, sink_positions="cache", global_layers=(3, 0), global_heads={2: [1, 0], 5: (3,)})),
        KVConfig("int2", recent=Recent()),
        KVConfig("k:int4+v:int2", recent=Recent(64, "k:none+v:int8", sinks=0), offload=True),
        KVConfig(window=Window(size=100, schedule="dynamic", summary="mean", summary_pages=2, summary_page_size=8)),
    ],
)
def test_str_and_parse_are_inverse(kv: KVConfig) -> None:
    assert KVConfig.parse(str(kv)) == kv


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int9", r"unknown word 'int9'; allowed: none, int8, int4, fp8, int3, int2, k:CODEC, v:CODEC, window:SIZE"),
        ("", "unknown word ''"),
        ("int8+int4", "gives codec twice"),
        ("int8+v:int4", r"names a codec for keys and values, int8, and another for one .*; write k:int8\+v:int4"),
        ("k:int8", r"names a codec for keys alone; write k:int8\+v:CODEC, or int8 for both"),
        ("v:int4+paged", r"names a codec for values alone; write k:CODEC\+v:int4, or int4 for both"),
        ("k:int8+k:int4", "gives k twice"),
        ("k:int8+v:int5", "v takes one of none, int8, int4, fp8, int3, int2, got 'int5'"),
        ("k+v:int8", "k takes one of none, int8, int4, fp8"),
        ("sinks:4", "sinks need a window"),
        ("window:x", "window takes a whole number, or \"dynamic\", got 'x'"),
        ("window", "window takes a whole number"),
        ("window:8+size:4", "gives the window's size twice"),
        ("summary:mean", "summary needs a window"),
        ("window:8+summary:max", "Window.summary must be None or \"mean\", got 'max'"),
        ("window:8+sink_positions:near", 'Window.sink_positions must be "absolute" or "cache", got \'near\''),
        ("window:8+global_layers:0,1", "global_layers takes layers such as 0.5, got '0,1'"),
        ("window:8+global_heads:2=0,2=1", "global_heads takes kv heads by layer"),
        ("window:8+global_heads:2.1", "global_heads takes kv heads by layer"),
        ("window:-5", "Window.size must be at least 1 token, got -5"),
        ("window:4+sinks:-1", "Window.sinks must be at least 0 tokens, got -1"),
        ("page_size:64", 'page_size needs store="paged"'),
        ("paged+page_size:48", "must be a power of two, got 48"),
        ("share", "unknown word 'share'"),
        ("recent:256", r"in more bits than the others, and these are in 'none'; name a codec .*int2\+recent:256"),
        ("int8+recent:256", "more bits than the others, and these are in 'int8'"),
        ("int2+recent", "recent takes a number of tokens, or this and a codec, such as 256:int8"),
        ("int2+recent:x:int8", "recent takes a number of tokens, .*, got 'x:int8'"),
        ("int2+recent:8:int9", "Recent.codec must be one of none, int8, int4, fp8, int3, int2, got 'int9'"),
        ("int2+recent:0", "Recent.size must be from 1 to .* tokens, got 0"),
        ("int2+recent_sinks:4", "recent_sinks needs recent tokens; write recent:SIZE"),
        ("int2+recent:8+recent_sinks:-1", "Recent.sinks must be from 0 to .* tokens, got -1"),
        ("int2+recent:8+window:9", "KVConfig.window lets go of them; leave one of the two out"),
        ("auto:1%+recent:8", "KVConfig.loss_change finds codecs by itself; name the codec"),
    ],
)
def test_a_bad_string_names_the_word_and_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVConfig.parse(text)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"codec": "int9"}, ValueError, "codec must be one of none, int8, int4, fp8, int3, int2, got 'int9'"),
        ({"codec": "k:int8"}, ValueError, r"KVConfig.codec: .* are written k:CODEC\+v:CODEC.*, got 'k:int8'"),
        ({"codec": "int8+v:int4"}, ValueError, r"are written k:CODEC\+v:CODEC, such as k:int8\+v:int4"),
        (
            {"codec": "k:int8+v:int9"},
            ValueError,
            "fp8, int3, int2 for keys and for values, got",
        ),
        ({"codec": ["int8"]}, ValueError, "KVConfig.codec must be one of"),
        ({"store": "disk"}, ValueError, "KVConfig.store must be one of auto, contiguous, paged, got 'disk'"),
        ({"window": -1}, ValueError, "at least 1 token, got -1"),
        ({"window": True}, TypeError, "KVConfig.window must be None, an int or an hfkv.Window, got True"),
        ({"window": "4"}, TypeError, "KVConfig.window"),
        ({"offload": 1}, TypeError, "KVConfig.offload must be True or False"),
        ({"device_budget": "8GiB"}, ValueError, "device_budget needs offload=True"),
        ({"offload": True, "device_budget": "8 pages"}, ValueError, "KVConfig.device_budget takes a size"),
        ({"offload": True, "device_budget": 0}, ValueError, "KVConfig.device_budget must be at least 1 byte"),
        ({"offload": True, "device_budget": 1.5}, TypeError, "KVConfig.device_budget must be a number of bytes"),
        (
            {"layers": {"0": KVConfig(offload=True, device_budget="1MiB")}},
            ValueError,
            "must not have a device_budget: it is for all layers together",
        ),
        ({"page_size": 0, "store": "paged"}, ValueError, "power of two, got 0"),
        ({"page_size": 1.5, "store": "paged"}, TypeError, "KVConfig.page_size"),
        ({"layers": {"a": KVConfig()}}, ValueError, "keys such as"),
        ({"layers": {"3-1": KVConfig()}}, ValueError, "ends before it starts"),
        ({"layers": {"0-2": KVConfig(), "2": KVConfig()}}, ValueError, "names layer 2 twice"),
        ({"layers": {"0": "int8"}}, TypeError, r"KVConfig.layers\['0'\] must be a KVConfig"),
        ({"layers": {"0": KVConfig(layers={"1": KVConfig()})}}, ValueError, "must not itself have layers"),
        ({"layers": 3}, TypeError, "KVConfig.layers must map"),
        ({"codec": "int2", "recent": 256}, TypeError, "KVConfig.recent must be None or an hfkv.Recent.*; got 256"),
    ],
)
def test_a_bad_field_is_named(fields: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        KVConfig(**fields)


def test_an_unknown_keyword_raises() -> None:
    with pytest.raises(TypeError, match="codecs"):
        KVConfig(codecs="int8")  # type: ignore[call-arg]


def test_layers_override_by_range() -> None:
    kv = KVConfig("int4", layers={"0-1": KVConfig(), "5": KVConfig("int8")})
    assert [kv.for_layer(i).codec for i in range(6)] == ["none", "none", "int4", "int4", "int4", "int8"]
    assert kv.last_named_layer == 5


def test_only_the_lossless_configs_say_so() -> None:
    assert KVConfig(store="paged", offload=True).is_lossless
    assert not KVConfig("int8").is_lossless
    assert not KVConfig(window=9).is_lossless
    assert not KVConfig(layers={"0": KVConfig("int8")}).is_lossless


def test_configs_are_values() -> None:
    kv = KVConfig("k:int8+v:int4", window=8, layers={"0": KVConfig()})
    assert copy.deepcopy(kv) == kv
    assert pickle.loads(pickle.dumps(kv)) == kv
    assert len({kv, copy.deepcopy(kv), KVConfig()}) == 2
    with pytest.raises(AttributeError):
        kv.codec = "int4"  # type: ignore[misc]
    with pytest.raises(TypeError):
        kv.layers["1"] = KVConfig()  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"size": 0}, ValueError),
        ({"size": 4, "sinks": -1}, ValueError),
        ({"size": 4.0}, TypeError),
        ({}, TypeError),
        ({"schedule": "static"}, ValueError),
        ({"size": 5, "sink_positions": "relative"}, ValueError),
        ({"size": 5, "global_layers": 3}, TypeError),
        ({"size": 5, "global_layers": [1, 1]}, ValueError),
        ({"size": 5, "global_heads": [1]}, TypeError),
        ({"size": 5, "global_heads": {0: []}}, ValueError),
        ({"size": 5, "global_heads": {0: (1,), "1": (0,)}}, TypeError),
        ({"size": 5, "global_heads": {0: (1,), None: (0,)}}, TypeError),
        ({"size": 5, "global_heads": {0: [1]}, "global_layers": [0]}, ValueError),
        ({"size": 5, "summary": "mean", "summary_pages": 0}, ValueError),
        ({"size": 5, "summary_pages": 3}, ValueError),
        ({"size": 1 << 70}, ValueError),
        ({"schedule": lambda seen: 3}, TypeError),
    ],
)
def test_a_bad_window_raises(fields: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match="Window"):
        Window(**fields)


def test_overrides_that_cannot_hold_raise() -> None:
    config = MistralConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, sliding_window=8)
    with pytest.raises(ValueError, match="gives layer 0 a window, but it slides over 8 tokens already"):
        KVCache(config, KVConfig(layers={"0": KVConfig(window=3)}))
    with pytest.raises(ValueError, match="names layer 0, which stays transformers' own"):
        KVCache(NAMED["qwen3_next"]().model, KVConfig(layers={"0": KVConfig("int8")}))
    for key in ("3\n", "٣", "0-1\n", "9" * 5000):
        with pytest.raises(ValueError, match=r"KVConfig.layers takes keys such as"):
            KVConfig(layers={key: KVConfig()})
    assert KVConfig(layers={"0-99999999999": KVConfig()}).last_named_layer == 99999999999


def test_a_schedule_of_ones_own_prints_as_no_rule() -> None:
    def dynamic(seen: int) -> int:
        return 3

    kv = KVConfig(window=Window(5, schedule=dynamic))
    assert str(kv) == "none+window:dynamic()+size:5+sinks:4"
    with pytest.raises(ValueError, match="window takes"):
        KVConfig.parse(str(kv))
