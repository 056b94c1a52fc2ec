"""What a plan may be given and what it says: one cache or many, paths, units, widths, and no floors out of thin air."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from transformers import AutoConfig

import hfkv
from hfkv import KVConfig, tiny_lm
from hfkv.cli.plan.screen import show
from hfkv.planning.footprint import Footprint
from hfkv.planning.geometry import Geometry
from tests.tiny import llama_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPEEDS: dict[str, Any] = {"bandwidth": 1e12, "bus": 5e10}


@pytest.fixture(scope="module")
def tiny() -> Geometry:
    return Geometry.of(llama_config(), torch.float32)


def test_one_cache_a_path_and_units_are_taken() -> None:
    for kv in ("int8", KVConfig(codec="int8")):
        plan = hfkv.memory_plan(tiny_lm.PATH, "1GiB", "1k", kv=kv, **SPEEDS)
        assert [cache.kv for cache in plan.caches] == ["int8"]
        assert (plan.model, plan.context) == (tiny_lm.PATH, 1024)
    assert KVConfig.for_budget(tiny_lm.PATH, "1GiB", 1024) == KVConfig()
    printed = str(plan)
    assert "Take " in printed
    assert "KV with weights" not in printed
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(plan)
    assert printed in "\n".join(line.rstrip() for line in capture.get().splitlines())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is measured here")
def test_a_device_that_is_not_here_has_no_floor() -> None:
    plan = hfkv.memory_plan("tiny", "1GiB", 100, kv="int8")
    assert plan.caches[0].floor_ms is plan.as_json()["speeds"]["bandwidth"] is None
    assert any("give --bandwidth" in note for note in plan.notes)
    here = hfkv.memory_plan("tiny", "1GiB", 100, kv="int8", device="cpu")
    assert here.caches[0].floor_ms is not None


def test_a_budget_below_a_page_of_every_layer_is_refused() -> None:
    plan = hfkv.memory_plan("small", "1GiB", 1000, kv=["none", "offload+device_budget:1B"], **SPEEDS)
    assert [cache.kv for cache in plan.caches] == ["none"]
    assert any("device_budget:1B is left out" in note for note in plan.notes)
    with pytest.raises(ValueError, match=r"at least ([0-9,]+) bytes") as refused:
        hfkv.memory_plan("small", "1GiB", 1000, kv="offload+device_budget:1B", **SPEEDS)
    found = re.search("at least ([0-9,]+) bytes", str(refused.value))
    assert found is not None
    least = int(found[1].replace(",", ""))
    assert hfkv.memory_plan("small", "1GiB", 1000, kv=f"offload+device_budget:{least}B", **SPEEDS).caches
    with pytest.raises(ValueError, match=f"budget must be at least {least:,} bytes"):
        KVConfig.for_budget("small", least - 1, 10_000, offload=True)
    assert KVConfig.for_budget("small", least, 10_000, offload=True).device_budget == least


@pytest.mark.parametrize("tokens", [20, 100, pytest.param(300, marks=pytest.mark.slow)])
def test_a_window_is_planned_with_the_most_that_a_reply_leaves(tiny: Geometry, tokens: int) -> None:
    for kv in map(KVConfig.parse, ("window:32", "int8+window:100+sinks:8", "window:32+paged+page_size:8")):
        planned = Footprint(tiny, kv, CPU).of(tokens, 2)
        most = max(Footprint(tiny, kv, CPU, reply).of(tokens, 2).allocated for reply in range(1, tokens))
        page = kv.page_size or 0
        more = page * Footprint(tiny, KVConfig(), CPU).of(1, 2).held  # a page of every row and layer
        assert most <= planned.allocated <= max(1.1 * most, planned.held) + more
        assert planned.peak >= planned.allocated


def test_beyond_the_models_most_the_longest_context_is_not_cut() -> None:
    config = AutoConfig.for_model(**llama_config().to_dict())
    most = config.max_position_embeddings
    plan = hfkv.memory_plan(config, "4GiB", 2 * most, kv="none", **SPEEDS)
    cache = plan.caches[0]
    assert all(cache.fits.values())
    assert cache.largest_context >= 2 * most
    assert sum("more than the model was made for" in note for note in plan.notes) == 1


def test_the_window_that_is_suggested_is_smaller_than_the_context() -> None:
    with pytest.raises(ValueError, match=r"KVConfig\(window=128\)"):
        KVConfig.for_budget("small", "1MiB", 1000)


def test_a_mistyped_name_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any, local_files_only: bool, **__: Any) -> None:
        assert local_files_only
        raise OSError("not there")

    monkeypatch.setattr(AutoConfig, "from_pretrained", found)
    for name in ("llama-9b", "./llama-9b", "/nowhere/at/all"):
        with pytest.raises(ValueError, match=r"neither a shape \(llama-8b, .*no such folder"):
            hfkv.memory_plan(name, "1GiB", 10)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_number_is_cut_off(width: int) -> None:
    kinds = ["none", "int8+window:64+sinks:2+global_heads:0=0.1", "none+offload"]
    plan = hfkv.memory_plan("small", "24GiB", 65_536, 2, kv=kinds, **SPEEDS)
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        show(plan, console)
    lines = capture.get().splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert "…" not in capture.get()
    assert re.search(r"cache +KV .*fits with", capture.get())
    assert ("wider terminals show" in " ".join(capture.get().split())) == (width < 100)
