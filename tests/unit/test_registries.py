"""What is known by name: codecs and their words, rules of windows, and what cannot be registered."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from hfkv.cache.factory import BUILDERS, register_layer
from hfkv.cache.kv_cache import KVCache
from hfkv.cache.layers.layer import KVLayer
from hfkv.codecs import CODECS, Codec, Int8, register_codec
from hfkv.kernels.backend import Backend
from hfkv.kernels.dispatch import BACKENDS, attention_kernel, forget_choices, register_backend
from hfkv.policy.codec_pair import CODEC_WORDS
from hfkv.policy.rules import EVERYTHING, RULES, Dynamic, WindowRule, register_rule
from hfkv.policy.window import Window
from tests.tiny import llama_config


def test_the_words_are_those_of_the_codecs() -> None:
    code = (
        "from hfkv.policy.codec_pair import CODEC_WORDS as words; before = list(words)\n"
        "from hfkv.codecs import CODECS; print(before == list(CODECS) == words)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "True"
    assert list(CODECS) == CODEC_WORDS


class Named(Int8):
    """int8 by another name."""

    def __init__(self, name: Any) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("name", "said"),
    [("int8", "there is a codec 'int8' already"), ("paged", "cannot be called 'paged'"), ("int 9", "plain words")],
)
def test_a_codec_has_a_word_of_its_own(name: str, said: str) -> None:
    before = dict(CODECS), list(CODEC_WORDS)
    with pytest.raises(ValueError, match=said):
        register_codec(Named(name))
    assert before == (CODECS, CODEC_WORDS)


class Halves(Dynamic):
    """Says another thing by its steps than by its size."""

    name = "halves"

    def size(self, seen: int) -> int:
        return 2048


class Spoken(WindowRule):
    """A name that is no word."""

    name, most = "two words", 8

    def size(self, seen: int) -> int:
        return 8


class Other(Spoken):
    """A name that is taken."""

    name = "dynamic"


def _rule(**fields: Any) -> WindowRule:
    return type("Made", (WindowRule,), {"name": "made", "most": 8, **fields})()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Halves(), "differ when 1 tokens"),
        (_rule(steps=((64, 8),)), r"none above 64; let the last step reach EVERYTHING"),
        (_rule(steps=((EVERYTHING, 100),)), r"size\(9\) must return at most 8|at most 8, .* got 100"),
        (_rule(size=lambda self, seen: 100), r"size\(9\) must return at most 8, .* got 100"),
        (_rule(steps=()), "must be None or a tuple with a step at least"),
        (_rule(steps=((10, 4), (5, 8))), "must rise, got 5 where at least 11 is due"),
        (_rule(steps=((EVERYTHING, 0),)), "sizes of at least 1"),
        (_rule(steps=(5,)), "pairs of ints, got 5"),
        (_rule(size=lambda self, seen: seen // 2), r"size\(1\) must return at least 1"),
        (_rule(size=lambda self, seen: 4.0), "must return an int"),
        (_rule(most=None, size=lambda self, seen: 8), "most must be an int"),
        (_rule(most=0, size=lambda self, seen: 8), "most must be at least 1"),
        (_rule(), "neither steps nor a size"),
        (_rule(name=5, size=lambda self, seen: 8), "name must be a str"),
        (type(_rule(steps=((EVERYTHING, 8),))), "must be an instance, got the class Made"),
        (None, "instance of a subclass of WindowRule, got None"),
        (Spoken(), "plain words"),
        (Other(), "a rule 'dynamic' already"),
    ],
)
def test_a_rule_has_a_word_of_its_own_and_says_one_thing(rule: WindowRule, said: str) -> None:
    before = dict(RULES)
    with pytest.raises((TypeError, ValueError), match=said):
        register_rule(rule)
    assert before == RULES


def test_a_size_above_the_most_is_refused_when_a_text_comes_that_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "made", rule := _rule(size=lambda self, seen: 8 if seen < 50 else 9))
    register_rule(rule)
    window = Window(schedule="made")
    with pytest.raises(ValueError, match=r"Made.size\(50\) must return at most 8, what Made.most says, got 9"):
        window.lower_bound(60)


def test_a_cell_run_again_replaces_what_it_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "again", None)
    monkeypatch.setitem(CODECS, "again", None)
    words = [*CODEC_WORDS]
    for module in ("codec_pair", "words"):
        monkeypatch.setattr(f"hfkv.policy.{module}.CODEC_WORDS", words)
    del RULES["again"], CODECS["again"]
    for size, numbers in ((4, None), (8, torch.int8)):
        rule, codec = (
            type("Again", (kind,), {"name": "again", "__module__": "__main__", **fields})()
            for kind, fields in (
                (WindowRule, {"most": size, "steps": ((EVERYTHING, size),)}),
                (Int8, {"numbers": numbers}),
            )
        )
        register_rule(rule)
        register_codec(codec)
        assert RULES["again"] is rule
        assert CODECS["again"] is codec
        # What was found out about the first codec is not said of the second.
        chosen = attention_kernel("again", torch.float32, torch.device("cpu"), 1, (64, 64))
        assert ("has no affine form" in chosen.reason) == (numbers is None)


class Silent(Backend):
    """Has nothing to say."""

    def serves(self, device: torch.device) -> bool:
        return True

    def attention(self, asked: Any) -> Any:
        return None


def test_what_is_no_codec_backend_or_builder_is_refused() -> None:
    before = dict(CODECS), list(CODEC_WORDS), list(BACKENDS), list(BUILDERS)
    planeless = type("Planeless", (Int8,), {"name": "planeless", "plane_names": ()})
    for register, given, said in (
        (register_codec, Int8, r"instance, got the class Int8; write Int8\(\)"),
        (register_codec, None, "subclass of hfkv.codecs.Codec, got None"),
        (register_codec, Named(None), "Named.name must be a str, .* got None"),
        (register_codec, planeless(), r"plane_names must be a tuple .* got \(\)"),
        (register_backend, Silent, "instance, got the class Silent"),
        (register_backend, None, "got None"),
        (register_backend, BACKENDS[0], "is registered already"),
        (register_layer, None, "got None"),
        (register_layer, KVLayer, "is a function from a LayerPlace"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            register(given)
    assert before == (CODECS, CODEC_WORDS, BACKENDS, BUILDERS)


def test_a_backend_or_builder_that_answers_nonsense_is_named() -> None:
    register_backend(Silent())
    try:
        with pytest.raises(TypeError, match=r"Silent.attention must return a Kernel, got None"):
            attention_kernel("int8", torch.float32, torch.device("cpu"), 1, (64, 64))
    finally:
        BACKENDS.pop(0)
        forget_choices()
    register_layer(lambda place: place.stock)
    try:
        with pytest.raises(TypeError, match=r"builder .*<lambda> must return a CacheLayer, or None .* layer 0"):
            KVCache(llama_config(), "int8")
    finally:
        BUILDERS.pop(0)


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_affine_forms_are_made_where_the_planes_are(codec: Codec) -> None:
    planes = codec.encode(torch.randn(1, 1, 3, 8))
    on_meta = tuple(plane.to("meta") for plane in planes)
    numbers, scale, low = codec.affine(on_meta, 8, torch.float32)
    assert {part.device.type for part in (numbers, scale, low) if part is not None} == {"meta"}
    assert numbers.shape == (1, 1, 3, 8)
