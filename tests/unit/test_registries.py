"""What is known by name: codecs and their words, rules of windows, and what cannot be registered."""

import subprocess
import sys

import pytest
import torch

from hfkv.codecs import CODECS, Codec, Int8, register_codec
from hfkv.policy.rules import RULES, Dynamic, WindowRule, register_rule
from hfkv.policy.words import CODEC_WORDS


def test_the_words_are_those_of_the_codecs() -> None:
    code = (
        "from hfkv.policy.words import CODEC_WORDS as words; before = list(words)\n"
        "from hfkv.codecs import CODECS; print(before == list(CODECS) == words)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "True"
    assert list(CODECS) == CODEC_WORDS


class Named(Int8):
    """int8 by another name."""

    def __init__(self, name: str) -> None:
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


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Halves(), "differ when 1 tokens"),
        (Spoken(), "plain words"),
        (Other(), "a rule 'dynamic' already"),
    ],
)
def test_a_rule_has_a_word_of_its_own_and_says_one_thing(rule: WindowRule, said: str) -> None:
    before = dict(RULES)
    with pytest.raises(ValueError, match=said):
        register_rule(rule)
    assert before == RULES


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_affine_forms_are_made_where_the_planes_are(codec: Codec) -> None:
    planes = codec.encode(torch.randn(1, 1, 3, 8))
    on_meta = tuple(plane.to("meta") for plane in planes)
    numbers, scale, low = codec.affine(on_meta, 8, torch.float32)
    assert {part.device.type for part in (numbers, scale, low) if part is not None} == {"meta"}
    assert numbers.shape == (1, 1, 3, 8)
