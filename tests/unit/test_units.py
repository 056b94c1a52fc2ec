"""Sizes and numbers as people write them: exact, and refused by name where they are too large."""

import re
from typing import Any

import pytest

from hfkv import KVConfig
from hfkv.bench import BenchError, Setting
from hfkv.cli.errors import CommandError
from hfkv.cli.said import whole_numbers
from hfkv.planning.speeds import read_speed
from hfkv.planning.tokens import read_tokens
from hfkv.policy.units import MOST_BYTES, read_bytes, say_bytes

NINES = "9" * 400
DIGITS = "9" * 5000  # more than int() reads


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("9007199254740993B", 9007199254740993),
        (f"{MOST_BYTES}B", MOST_BYTES),
        ("1.5GiB", 3 << 29),
        ("0.3KiB", 307),
        ("0" * 400 + "7kB", 7000),
        ("1.1 GB", 1_100_000_000),
    ],
)
def test_sizes_are_exact(given: str, size: int) -> None:
    assert read_bytes("size", given) == size
    assert read_bytes("size", say_bytes(size)) == size


@pytest.mark.parametrize("read", [read_bytes, read_tokens, read_speed], ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    "given", [NINES, DIGITS, f"{NINES}GB", f"{DIGITS}TB/s", f"{DIGITS}k", 10**400, 10**5000], ids=range(7)
)
def test_numbers_of_hundreds_of_digits_are_refused_by_name(read: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=r"^that field (must be at most|takes)") as told:
        read("that field", given)
    assert len(str(told.value)) < 400


def test_the_words_and_options_refuse_them_too() -> None:
    for words, said in (
        ("reuse:0B", "'reuse:0B': reuse must be at least 1 byte, got 0B"),
        ("offload+device_budget:0.3B", "device_budget must be at least 1 byte, got 0.3B"),
        (f"reuse:{NINES}GiB", "reuse must be at most"),
        (f"paged+page_size:{1 << 63}", "KVConfig.page_size must be at most"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            KVConfig.parse(words)
    with pytest.raises(CommandError, match="--context takes numbers of at most"):
        whole_numbers("--context", f"512,{DIGITS}")
    for fields, said in (
        ({"seed": 99999999999999999999999}, "seed must be from"),
        ({"batch": 1 << 70}, "batch must be at most"),
        ({"seconds": float("inf")}, "seconds must be above 0 and finite"),
    ):
        given: dict[str, Any] = {"shape": "tiny", "contexts": (64,), **fields}
        with pytest.raises(BenchError, match=said):
            Setting("step", **given)
