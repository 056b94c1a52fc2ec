"""Windows over latents against brute force: the rule on the full sequence, without a cache."""

import pytest
import torch

from hfkv import KVConfig, Window
from hfkv.attention.latent.crossover import forced
from tests.windowed import DYNAMIC, PADS, SPLITS, error

RULES = {
    "sinks": Window(7, 4),
    "no sinks": Window(64, 0),
    "cache": Window(12, 3, sink_positions="cache"),
    "jumps": Window(80, schedule=DYNAMIC["jumps"], sinks=2, sink_positions="cache"),
    "global layer": Window(9, 2, global_layers=[1]),
    "summary": Window(10, 3, summary="mean", summary_pages=3, summary_page_size=4),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:4"])
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_brute_force(rule: str, padding: str, store: str, split: str) -> None:
    kv = KVConfig.parse(store)
    kv = KVConfig(window=RULES[rule], store=kv.store, page_size=kv.page_size)
    assert error("deepseek_v3", kv, padding, split) <= 1e-5


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("rule", ["sinks", "no sinks"])
def test_both_forms_equal_brute_force(rule: str, padding: str, form: str) -> None:
    with forced(form):
        assert error("deepseek_v3", KVConfig(window=RULES[rule]), padding, "chunks") <= 1e-5


@pytest.mark.pairwise
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rule", ["", "+window:7+sinks:4"])
@pytest.mark.parametrize("store", ["contiguous", "paged+page_size:16+offload"])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "k:int4+v:none"])
def test_codecs_equal_brute_force_on_decoded_latents(codec: str, store: str, rule: str, split: str) -> None:
    # In float64 no latent is rounded the other way because a sum upstream differs in its last bit.
    assert error("deepseek_v3", KVConfig.parse(f"{codec}{rule}+{store}"), "ragged", split, torch.float64) <= 1e-5
