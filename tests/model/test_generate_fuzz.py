"""Calls of `generate` drawn at random: patched without loss, every one gives what stock gives, or both raise alike."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.cases import Case, draw, smaller
from tests.fuzz.half import errors_in_half_precision
from tests.fuzz.subjects import KVS, NAMES, Subject

CASES, DOUBLE_CASES = 18, 6
SMOKE = {
    "llama": "none",
    "gemma3": "none+paged+page_size:4",
    "t5": "none+offload",
    "deepseek_v3": "none+paged+page_size:4+reuse",
}
# Of dense models: elsewhere rounding may choose another expert.
HALF = ("llama", "gemma3", "gpt2", "bart", "t5", "qwen3_next")
# The others' states are not their tokens' own, and the patch says so.
REUSED = ("llama", "mistral", "gemma2", "gemma3", "qwen3_moe", "gpt2", "deepseek_v3", "gpt_oss", "opt", "cohere2")


def check(name: str, kv: str, seeds: range, dtype: torch.dtype = torch.float32) -> None:
    try:
        subject = Subject(name, kv, dtype)
    except ValueError as refusal:
        assert str(refusal).startswith("reuse: ")  # noqa: PT017
        assert name not in REUSED
        return
    refused = 0
    for seed in seeds:
        case = draw(seed)
        found = subject.difference(case)
        refused += subject.was_refused
        if found is not None:
            case, alone = smallest(name, kv, dtype, case)
            pytest.fail(f"{name}, kv={kv!r}, {case}: {alone or found + ' (only after the cases before it)'}")
    assert refused <= len(seeds) // 4


def smallest(name: str, kv: str, dtype: torch.dtype, case: Case) -> tuple[Case, str | None]:
    """The least that still fails by itself, and how."""
    found = Subject(name, kv, dtype).difference(case)
    for less in smaller(case) if found else ():
        if Subject(name, kv, dtype).difference(less) is not None:
            return smallest(name, kv, dtype, less)
    return case, found


@pytest.mark.parametrize("name", SMOKE)
def test_a_few_calls_give_what_stock_gives(name: str) -> None:
    first = 10_000 * list(SMOKE).index(name)
    check(name, SMOKE[name], range(first, first + 10))


@pytest.mark.slow
@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("name", NAMES)
def test_every_call_gives_what_stock_gives(name: str, kv: str) -> None:
    first = 1000 * (NAMES.index(name) * len(KVS) + KVS.index(kv))
    check(name, kv, range(first, first + CASES))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_call_gives_what_stock_gives_in_float64(name: str) -> None:
    first = 500_000 + 1000 * NAMES.index(name)
    check(name, "none", range(first, first + DOUBLE_CASES), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_errs_at_most_twice_as_much_as_stock(name: str, way: str) -> None:
    stock, ours = errors_in_half_precision(name, way)
    assert 0 < ours <= 2 * stock
