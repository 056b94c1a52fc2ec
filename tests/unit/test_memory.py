"""`cache.memory()`: every byte of `nbytes()` and `held_bytes()`, by layer, plane and device."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    StoppingCriteriaList,
)

import hfkv
from hfkv import CacheMemory, KVCache, KVConfig, Window
from hfkv.cache.memory import Bytes, PlaneMemory
from hfkv.codecs import CODECS, Codecs
from hfkv.policy.units import about_bytes
from tests.tiny import feed, greedy, llama, llama_config, prompt
from tests.unit.test_cache import PRODUCT, filled
from tests.zoo import NAMED


def check_sums(cache):
    memory = cache.memory()
    assert memory.allocated_bytes == cache.nbytes()
    assert memory.held_bytes == cache.held_bytes()
    for parts in (memory.by_device(), memory.by_layer(), memory.by_plane()):
        assert sum(size.allocated for size in parts.values()) == cache.nbytes()
        assert sum(size.held for size in parts.values()) == cache.held_bytes()
    return memory


@pytest.mark.parametrize("kv", PRODUCT)
def test_the_rows_add_up_after_every_operation(kv):
    cache = filled(kv, tokens=23)
    memory = check_sums(cache)
    codecs, parts = Codecs.named(KVConfig.of(kv).codec), ("key", "value")
    expected = [(layer, part, name) for layer in (0, 1) for part in parts for name in codecs.of(part).plane_names]
    rows = dict.fromkeys((row.layer, row.part, row.plane) for row in memory.rows if row.layer is not None)
    assert list(rows) == expected
    assert {row.plane for row in memory.rows if row.layer is None} <= {"staging buffers"}
    assert all(0 <= row.held_bytes <= row.allocated_bytes > 0 for row in memory.rows)
    held = {(row.part, row.plane): 0 for row in memory.rows if row.layer is not None}
    for row in (row for row in memory.rows if row.layer is not None):
        held[row.part, row.plane] += row.held_bytes
    assert all(held.values())
    before = memory.held_bytes
    cache.crop(-3)
    assert check_sums(cache).held_bytes <= before
    cache.batch_repeat_interleave(3)
    check_sums(cache)
    cache.reorder_cache(torch.tensor([0, 0, 3, 3, 5, 5]))
    check_sums(cache)
    twin = cache.fork(2)
    feed(twin, 12, 5)
    check_sums(twin)
    check_sums(cache)
    cache.batch_select_indices(torch.tensor([1]))
    check_sums(cache)
    cache.reset()
    assert check_sums(cache) == CacheMemory(())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("head_dim", [16, 12, 6])
def test_every_plane_has_a_name_and_the_bytes_of_its_dtype(codec, head_dim):
    planes = CODECS[codec].encode(torch.randn(2, 2, 5, head_dim))
    assert len(planes) == len(CODECS[codec].plane_names) == len(set(CODECS[codec].plane_names))
    cache = KVCache(llama_config(head_dim=head_dim), codec)
    feed(cache, 2, 5, head_dim)
    by_name = {row.plane: row.held_bytes for row in cache.memory().rows if (row.layer, row.part) == (1, "value")}
    assert by_name == {
        name: plane.numel() * plane.element_size()
        for name, plane in zip(CODECS[codec].plane_names, planes, strict=True)
    }


def test_an_empty_cache_has_no_rows():
    memory = check_sums(KVCache(llama_config()))
    assert memory == CacheMemory(())
    assert memory.total() == Bytes(0, 0)
    assert "layers" in str(memory)


@pytest.mark.parametrize("kv", ["none", "int8+paged+page_size:4"])
def test_heads_that_slide_have_rows_of_their_own(kv):
    kv = KVConfig.parse(kv)
    window = Window(6, sinks=2, global_heads={1: [1]})
    cache = KVCache(llama_config(), KVConfig(codec=kv.codec, store=kv.store, page_size=kv.page_size, window=window))
    check_sums(cache)
    feed(cache, 2, 30)
    feed(cache, 2, 1)
    memory = check_sums(cache)
    assert {row.heads for row in memory.rows if row.layer == 0} == {()}
    held = {
        heads: sum(row.held_bytes for row in memory.rows if (row.layer, row.heads) == (1, heads))
        for heads in [(1,), (0,)]
    }
    assert held[1,] > held[0,] > 0
    assert sum(held.values()) == memory.by_layer()[1].held
    assert "of heads 1" in str(memory)


def test_layers_of_transformers_own_are_rows_too():
    sample = NAMED["qwen3_next"]()
    hfkv.patch(sample.model, "int8")
    cache = sample.model.hfkv.new_cache()
    greedy(sample.model, sample.inputs, past_key_values=cache)
    memory = check_sums(cache)
    own = [row for row in memory.rows if row.part == "state"]
    assert {row.layer for row in own} == set(sample.model.hfkv.own_layers)
    assert {row.plane for row in own} >= {"conv_states[0]", "recurrent_states[0]"}
    assert all(row.held_bytes == row.allocated_bytes > 0 for row in own if row.plane.startswith("recurrent"))


def test_a_storage_that_layers_share_counts_once():
    class Stock:
        def __init__(self, states):
            self.keys, self.values = states[0], states[1]

    states = torch.zeros(2, 3, 4)
    memory = CacheMemory.of([Stock(states), Stock(states), Stock(torch.ones(2, 5))])
    assert memory.by_layer() == {0: Bytes(96, 96), 1: Bytes(0, 0), 2: Bytes(40, 40)}
    assert [row.part for row in memory.rows[:2]] == ["key", "value"]


def test_cross_attention_counts_only_the_decoders_own_cache():
    sample = NAMED["t5"]()
    with hfkv.patch(sample.model, "int4"):
        output = greedy(sample.model, sample.inputs, return_dict_in_generate=True)
    memory = check_sums(output.past_key_values.self_attention_cache)
    assert {row.plane for row in memory.rows} == {"codes", "scale_and_low"}


def test_layers_with_policies_of_their_own_have_their_own_planes():
    cache = KVCache(llama_config(num_hidden_layers=3), KVConfig(codec="int8", layers={"1": KVConfig()}))
    feed(cache, 2, 8)
    memory = check_sums(cache)
    assert {row.plane for row in memory.rows if row.layer == 1} == {"states"}
    assert memory.by_plane()["key", "codes"].held == 2 * 2 * 2 * 8 * 16


def test_layers_that_are_alike_share_a_line():
    cache = KVCache(llama_config(num_hidden_layers=6), KVConfig(layers={"4": KVConfig(codec="int8")}))
    feed(cache, 2, 8)
    lines = [line.split() for line in str(cache.memory()).splitlines() if line]
    assert [line[0] for line in lines[2:]] == ["0-3"] * 2 + ["4"] * 4 + ["5"] * 2 + ["all"]
    # 4 layers x batch 2 x 2 heads x 8 tokens x 16 numbers x 4 bytes
    assert lines[2] == ["0-3", "key", "states", "cpu", "8.00", "KiB", "8.00", "KiB"]
    assert lines[-1][:2] == ["all", "cpu"]


def test_what_layers_share_is_counted_beside_them():
    cache = filled("int8")
    staging = PlaneMemory(None, "state", "staging", torch.device("meta"), 4096, 0)
    memory = CacheMemory.of(cache.layers, [staging])
    assert memory.total() == Bytes(cache.nbytes() + 4096, cache.held_bytes())
    assert memory.by_device()["meta"] == Bytes(4096, 0)
    assert memory.by_layer()[None] == Bytes(4096, 0)
    lines = [line.split() for line in str(memory).splitlines()]
    assert ["shared", "state", "staging", "meta", "0", "B", "4.00", "KiB"] in lines
    assert lines[2][0] == "0-1"


def test_a_patched_models_cache_is_what_generate_left_in_it():
    model = llama()
    with hfkv.patch(model, "int8"):
        cache = model.hfkv.new_cache()
        greedy(model, prompt(), past_key_values=cache)
    memory = check_sums(cache)
    # 2 rows, 2 heads, 9 + 12 - 1 tokens
    assert memory.by_plane()["key", "codes"].held == 2 * 2 * 2 * 20 * 16
    assert memory.by_plane()["key", "scale"].held == 2 * 2 * 2 * 20 * 2


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (100 * 2**20, "100 MiB"),
        (int(12.34 * 2**30), "12.3 GiB"),
        (5000 * 2**30, "5,000 GiB"),
        (-(2**21), "-2.00 MiB"),
    ],
)
def test_sizes_are_said_in_three_digits(size, text):
    assert about_bytes(size) == text


def test_the_documentations_example_runs(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "use" / "memory.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert (tmp_path / "memory.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert str(names["monitor"].peak["caches"]) in said
    assert names["monitor"].peak["caches"] > 0
    # The table on the page is the one it prints.
    (shown,) = re.findall(r"\$ print\(cache.memory\(\)\)\n(.*?)```", text, re.DOTALL)
    assert shown.rstrip() in said
    check_sums(names["cache"])


def test_a_length_that_cannot_be_reserved_is_grown_into(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: torch.ones(len(ids), dtype=torch.bool)])
    for kv in ("none", "paged"):
        with hfkv.patch(model, kv):
            assert greedy(model, prompt(), 10**10, stopping_criteria=stop).shape == (2, 10)
        assert "no room to reserve" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("kv", "batch", "tokens", "keep"),
    [("paged", 16, 600, [0]), ("none", 16, 600, [0]), ("paged", 8, 600, [0] * 8), ("window:500+paged", 1, 2000, [0])],
)
def test_memory_follows_what_is_held(kv: str, batch: int, tokens: int, keep: list[int]) -> None:
    cache = KVCache(llama_config(), kv)
    feed(cache, batch, tokens)
    cache.batch_select_indices(torch.tensor(keep))
    feed(cache, len(keep), 1)
    layer = cache.kv_layers[0]
    row = cache.held_bytes() / layer.store.length / len(set(keep))
    page = getattr(layer.store, "page_size", 0)
    assert cache.nbytes() <= 1.3 * cache.held_bytes() + 2 * len(keep) * page * row


def test_a_reset_forgets_the_reservation() -> None:
    cache = KVCache(llama_config())
    cache.reserve(100_000)
    feed(cache, 1, 5)
    cache.reset()
    feed(cache, 16, 5)
    assert cache.nbytes() == cache.held_bytes()
