"""`Step`: layers of one kind work out once what they do alike, and a layer out of step does the same by itself."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import hfkv
from hfkv import KVCache
from hfkv.cache.layers.following import Following
from hfkv.cache.layers.layer import KVLayer
from hfkv.cache.step import Step
from hfkv.cache.view import KVView
from tests.tiny import feed, greedy, llama, llama_config, prompt

WINDOWS = ["window:5", "window:6+sinks:2", "int8+window:6+sinks:2", "fp8+window:6+sinks:2"]
KINDS = ["none", "int8", "fp8", "int4", "paged", "int8+paged", "k:none+v:int4", *WINDOWS]
LAYERS = 3


def cache_of(kv: str, **changes: Any) -> KVCache:
    return KVCache(llama_config(num_hidden_layers=LAYERS, **changes), kv)


def update(cache: KVCache, tokens: int, layer: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.update(torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 16), layer)


@contextmanager
def alone() -> Iterator[None]:
    """Every layer works out everything by itself."""
    with mock.patch.object(Following, "_next_step", lambda self, state, keys, values: Step(state, None)):
        yield


@contextmanager
def steps_made() -> Iterator[list[Step]]:
    made: list[Step] = []
    plan = Following._next_step

    def next_step(layer: Any, *args: Any) -> Step:
        made.append(plan(layer, *args))
        return made[-1]

    with mock.patch.object(Following, "_next_step", next_step):
        yield made


def everything(cache: KVCache) -> list[Any]:
    found = []
    for layer in cache.layers:
        held = layer.contents()
        if held is not None:
            found.append((held.seen, held.gone_below, held.pads, *(plane.float() for plane in held.tokens)))
            found[-1] += tuple(plane.float() for plane in held.slots or ())
    return found


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def operate(cache: KVCache, seed: int) -> list[Any]:
    """Random operations, many of which leave layers in different states; what is held in the end."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    for layer in range(LAYERS):
        update(cache, 4, layer)
    for _ in range(14):
        what = chance.choice(
            [
                "step",
                "step",
                "step",
                "skip",
                "twice",
                "one",
                "crop",
                "rows",
                "fork",
                "several",
                "reset",
                "record",
                "back",
            ]
        )
        batch = cache.batch_size or 2
        if what in ("step", "several"):
            for layer in range(LAYERS):
                update(cache, 1 if what == "step" else 3, layer, batch)
        elif what == "skip":
            for layer in range(1, LAYERS):
                update(cache, 1, layer, batch)
        elif what == "twice":
            for layer in (0, 1, 1, 2):
                update(cache, 1, layer, batch)
        elif what == "one":
            update(cache, chance.randint(1, 2), chance.randrange(LAYERS), batch)
        elif what == "crop":
            layer = cache.layers[chance.randrange(LAYERS)]
            if layer.window is None:
                layer.crop(-min(chance.randint(1, 3), layer.get_seq_length()))
        elif what == "record":
            for layer in cache.layers[: chance.randint(1, LAYERS)]:
                layer.activate_past_recording()
        elif what == "back":
            for layer in cache.layers:
                if layer.record_past:
                    layer.crop(-chance.randint(0, 1))
        elif what == "rows":
            cache.reorder_cache(torch.tensor([chance.randrange(batch) for _ in range(batch)]))
        elif what == "fork":
            cache = cache.fork()
        elif chance.random() < 0.3:
            cache.reset()
            for layer in range(LAYERS):
                update(cache, 2, layer, batch)
    return everything(cache)


@pytest.mark.parametrize("kv", KINDS)
def test_layers_that_fall_out_of_step_hold_what_they_would_alone(kv: str) -> None:
    with mock.patch("hfkv.stores.CPU_PAGE_SIZE", 4):
        for seed in range(8):
            together = operate(cache_of(kv), seed)
            with alone():
                by_itself = operate(cache_of(kv), seed)
            assert equal(together, by_itself), f"seed {seed}"


@pytest.mark.parametrize("kv", ["none", "int8", "paged", "window:6+sinks:2", "int8+paged"])
def test_one_layer_of_a_kind_works_out_a_step(kv: str) -> None:
    cache = cache_of(kv)
    cache.reserve(64)
    feed(cache, 2, 9)
    for _ in range(4):
        with steps_made() as made:
            feed(cache, 2, 1)
        assert len(made) == 1
    assert any(step.placing is not None for step in made)


def test_layers_of_other_kinds_work_out_their_own() -> None:
    config = llama_config(num_hidden_layers=4)
    cache = KVCache(
        config, hfkv.KVConfig(codec="none", layers={name: hfkv.KVConfig(codec="int8") for name in ("1", "3")})
    )
    feed(cache, 1, 5)
    with steps_made() as made:
        feed(cache, 1, 1)
    assert len(made) == 2


@pytest.mark.parametrize("kv", ["none", "int8", "paged", "window:24+sinks:2", "int8+window:24"])
def test_an_assistant_keeps_layers_in_step(kv: str) -> None:
    model = llama(num_hidden_layers=LAYERS).eval()
    ids = torch.randint(3, 99, (1, 12)).repeat(1, 3)
    append, alone = KVLayer.append, []
    watched = mock.patch.object(KVLayer, "append", lambda layer, *new: (alone.append(layer), append(layer, *new))[1])
    with hfkv.patch(model, kv), steps_made() as made, watched:
        model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)
    # By itself a layer appends the prompt, and what goes beyond the length reserved.
    assert len(alone) <= 2 * LAYERS
    assert sum(step.placing is not None for step in made) >= 4


@pytest.mark.parametrize("kv", ["none", "int8", "paged", "int4"])
def test_a_view_of_a_step_is_as_any_view(kv: str) -> None:
    cache = cache_of(kv)
    feed(cache, 2, 5)
    key, value = update(cache, 1, 0)
    assert isinstance(key, KVView)
    assert torch.equal(key + 0, cache.layers[0].keys)
    assert torch.equal(value.clone(), cache.layers[0].values)
    assert torch.equal(key.transpose(1, 2).contiguous(), cache.layers[0].keys.transpose(1, 2))
    cache.layers[0].crop(-2)
    with pytest.raises(RuntimeError, match="stale"):
        key.clone()


def test_a_windowed_view_of_a_step_is_refused_by_foreign_attentions() -> None:
    cache = cache_of("window:6+sinks:2")
    feed(cache, 1, 9)
    key, _ = update(cache, 1, 0, batch=1)
    with pytest.raises(RuntimeError, match="does not know the window"):
        key + 0


def test_tokens_of_another_dtype_or_batch_are_refused_in_a_step() -> None:
    for kv in ("none", "int8", "paged"):
        cache = cache_of(kv)
        feed(cache, 2, 5)
        feed(cache, 2, 1)
        with pytest.raises(ValueError, match="of batch 2"):
            update(cache, 1, 0, batch=3)
        with pytest.raises(ValueError, match=r"was given torch\.float64"):
            cache.update(torch.randn(2, 2, 1, 16).double(), torch.randn(2, 2, 1, 16).double(), 0)
        feed(cache, 2, 1)
        assert cache.get_seq_length() == 7


def test_a_layer_that_holds_other_rows_or_numbers_refuses_what_the_first_takes() -> None:
    for batch, dtype, said in ((2, torch.float32, "of batch 2"), (1, torch.float16, r"was given torch\.float32")):
        cache = cache_of("none")
        cache.reserve(64)
        update(cache, 3, 0, batch=1)
        cache.update(*(torch.randn(batch, 2, 3, 16).to(dtype) for _ in "kv"), 1)
        for tokens in (4, 1):
            update(cache, tokens, 0, batch=1)
            with pytest.raises(ValueError, match=said):
                update(cache, tokens, 1, batch=1)


def test_a_shared_page_is_copied_before_it_is_written_to_in_a_step() -> None:
    cache = cache_of("paged")
    feed(cache, 2, 5)
    feed(cache, 2, 1)
    other = cache.fork()
    before = everything(other)
    feed(cache, 2, 1)
    assert equal(everything(other), before)
    feed(other, 2, 1)
    assert not torch.equal(everything(other)[0][3], everything(cache)[0][3])


@pytest.mark.parametrize("kv", ["none", "int8", "paged", "window:6+sinks:2", "int8+window:6+sinks:2"])
def test_padded_rows_generate_what_they_do_without_steps(kv: str) -> None:
    model = llama(num_hidden_layers=LAYERS).double()
    with hfkv.patch(model, kv):
        together = greedy(model, prompt(3, 9, padding=4), 14)
        with alone():
            expected = greedy(model, prompt(3, 9, padding=4), 14)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("kv", ["none", "int8+window:6+sinks:2", "paged"])
def test_steps_that_are_done_are_forgotten(kv: str) -> None:
    def steps() -> int:
        gc.collect()
        return sum(type(found) is Step for found in gc.get_objects())

    cache = cache_of(kv)
    feed(cache, 2, 9)
    before = steps()
    for _ in range(20):
        feed(cache, 2, 1)
    assert steps() <= before + 2


@pytest.mark.parametrize("kv", ["none", "int8", "paged"])
def test_a_copy_has_no_step_of_its_original(kv: str) -> None:
    cache = cache_of(kv)
    feed(cache, 2, 5)
    feed(cache, 2, 1)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache.fork()):
        assert all(layer.followed is None and layer.group.step is None for layer in copied.layers)
        assert len({id(layer.group) for layer in copied.layers}) == 1
        before = everything(cache)
        feed(copied, 2, 1)
        assert equal(everything(cache), before)
        assert copied.get_seq_length() == 7


def test_the_first_layer_of_a_forward_that_failed_is_taken_back() -> None:
    cache = cache_of("none")
    feed(cache, 1, 5)
    update(cache, 1, 0, batch=1)
    with mock.patch.object(KVLayer, "update", side_effect=MemoryError("no")), pytest.raises(MemoryError):
        update(cache, 1, 1, batch=1)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5]
    feed(cache, 1, 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6, 6]


@pytest.mark.parametrize("kv", ["paged", "int8+paged", "fp8+paged"])
def test_rows_that_share_their_last_page_keep_layers_in_step(kv: str) -> None:
    cache = cache_of(kv)
    cache.reserve(64)
    feed(cache, 2, 9)
    cache.batch_repeat_interleave(2)
    other = cache.fork()
    feed(cache, 4, 1)  # planes grow
    before = everything(other)
    for rows in ([0, 0, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]):
        cache.reorder_cache(torch.tensor(rows))
        expected = everything(cache)
        with steps_made() as made:
            feed(cache, 4, 1)
        assert [step.placing is not None for step in made] == [True]
        assert equal(
            [[plane[:, :, :-1] for plane in layer[3:]] for layer in everything(cache)], [x[3:] for x in expected]
        )
        for layer in cache.layers:
            listed = [page for row in layer.store.table for page in row]
            listed += [page for row in other.layers[cache.layers.index(layer)].store.table for page in row]
            counts = [listed.count(page) for page in range(layer.store.blocks.size)]
            assert counts == layer.store.blocks.refcounts
            assert len({row[-1] for row in layer.store.table}) == 4
    assert equal(everything(other), before)
