"""The least lossy weights and caches that fit: what is recommended, and what a budget buys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hfkv
from hfkv import KVConfig
from hfkv.models.shapes import shape_config
from hfkv.planning.fit import Planner
from tests.tiny import llama, prompt

SPEEDS: dict[str, Any] = {"bandwidth": "1TB/s", "bus": "50GB/s"}


@pytest.fixture(scope="module")
def big() -> Planner:
    return Planner.of(shape_config("llama-8b", None), None, torch.device("cuda"))


@pytest.fixture
def plans_of_llama_8b(big: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that model once, whoever plans it."""
    monkeypatch.setattr(Planner, "of", lambda *_, **__: big)


@pytest.mark.parametrize(
    ("memory", "context", "weights", "kv"),
    [
        ("34GiB", 131_072, "bf16", "none"),
        ("24GiB", 131_072, "bf16", "int8"),
        ("20.5GiB", 131_072, "bf16", "int4"),
        ("16GiB", 32_768, "int8", "none"),
        ("8GiB", 8192, "int4", "none"),
        ("8GiB", 131_072, "int4", "none+offload"),
        ("4GiB", 8192, None, None),
    ],
)
def test_the_least_lossy_that_fits_is_recommended(
    memory: str, context: int, weights: str | None, kv: str | None, plans_of_llama_8b: None
) -> None:
    plan = hfkv.memory_plan("llama-8b", memory, context, **SPEEDS)
    found = plan.recommended
    assert (found and found.weights, found and found.kv) == (weights, kv)
    assert plan.chosen == (weights or "int4")


def test_a_window_is_the_last_resort(plans_of_llama_8b: None) -> None:
    kinds = ["int8+window:512", "none", "int4"]
    for memory, kv in (("40GiB", "none"), ("22GiB", "int4"), ("17GiB", "int8+window:512+sinks:4")):
        plan = hfkv.memory_plan("llama-8b", memory, 131_072, kv=kinds, weights="bf16", **SPEEDS)
        assert plan.recommended is not None
        assert plan.recommended.kv == kv
    assert "forgotten" in plan.recommended.costs


def test_the_budget_buys_the_least_loss() -> None:
    token_bytes = {"none": 16_384, "int8": 8320, "int4": 4352}
    for codec, size in token_bytes.items():
        assert KVConfig.for_budget("small", 10_000 * 3 * size, 10_000, 3) == KVConfig(codec=codec)
    assert KVConfig.for_budget("small", 10_000 * 16_384 - 1, 10_000) == KVConfig(codec="int8")
    kv = KVConfig.for_budget("small", "128MiB", 10_000, offload=True)
    assert kv == KVConfig(offload=True, device_budget=2**27)
    assert KVConfig.for_budget("small", "1GiB", 10_000, offload=True) == KVConfig()


def test_a_budget_that_buys_nothing_says_what_would() -> None:
    with pytest.raises(ValueError, match=r"int4 needs 41.5 MiB \(43,520,000 bytes\), and 7,228 tokens .*offload=True"):
        KVConfig.for_budget("small", "30MiB", 10_000)
    assert KVConfig.for_budget("small", "30MiB", 7228) == KVConfig(codec="int4")
    assert KVConfig.for_budget("small", 43_520_000, 10_000) == KVConfig(codec="int4")


def test_the_budget_keeps_its_promise() -> None:
    model = llama()
    for budget, codec in ((81_000, "none"), (30_000, "int8"), (20_000, "int4")):
        kv = KVConfig.for_budget(model, budget, 79, 2)
        assert kv.codec == codec
        with hfkv.patch(model, kv):
            cache = model.generate(
                **prompt(2, 50), do_sample=False, max_new_tokens=30, return_dict_in_generate=True
            ).past_key_values
        assert cache.get_seq_length() == 79
        assert 0.7 * budget < cache.nbytes() <= budget


def test_a_budget_is_checked() -> None:
    for arguments, message in (
        (("8 apples", 10), "budget takes a size"),
        (("8GiB", 0), "context must be"),
        (("8GiB", 10, 0), "batch must be"),
    ):
        with pytest.raises(ValueError, match=message):
            KVConfig.for_budget("tiny", *arguments)
