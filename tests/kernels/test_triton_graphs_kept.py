"""Captured decode steps outlive the cache that they were captured with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import hfkv
from tests.kernels.test_triton_graphs import counts, graphs, on
from tests.tiny import greedy, llama, prompt

__all__ = ["counts", "graphs"]  # fixtures


@pytest.mark.parametrize(
    "kv", ["none", "int8+paged+page_size:4", pytest.param("window:8+sinks:2", marks=pytest.mark.slow)]
)
def test_a_later_call_replays_what_was_captured(device: torch.device, counts: dict[str, int], kv: str) -> None:
    model = llama(num_hidden_layers=1).to(device)
    prompts = [on(device, {"input_ids": prompt(2, length)["input_ids"]}) for length in (9, 12)]
    with hfkv.patch(model, kv):
        expected = [greedy(model, inputs, 5) for inputs in prompts]
    with hfkv.patch(model, kv, graphs=True):
        for inputs, text in zip(prompts, expected, strict=True):
            assert torch.equal(greedy(model, inputs, 5), text)
    assert counts["captures"] == 1
    assert counts["replays"] == 3 + 4  # the second call from its first step on


def test_other_calls_capture_for_themselves(device: torch.device, counts: dict[str, int]) -> None:
    model = llama(num_hidden_layers=1).to(device)
    with hfkv.patch(model, graphs=True):
        for count, (rows, length) in enumerate(((1, 9), (2, 9), (2, 300)), start=1):
            inputs = on(device, {"input_ids": prompt(rows, length)["input_ids"]})
            greedy(model, inputs, 3)
            assert counts["captures"] == count


@pytest.mark.parametrize("kv", ["none", "paged+page_size:4"])
def test_planes_that_are_in_use_are_not_lent(device: torch.device, counts: dict[str, int], kv: str) -> None:
    model = llama(num_hidden_layers=1).to(device)
    first, second = (on(device, {"input_ids": prompt(1, length)["input_ids"]}) for length in (9, 11))
    with hfkv.patch(model, kv, graphs=True) as patch:
        cache = patch.new_cache()
        cache.reserve(40)
        greedy(model, first, 4, past_key_values=cache)
        held = [layer.keys.clone() for layer in cache.layers]
        greedy(model, second, 4)
        assert counts["captures"] == 2
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, held, strict=True))


def numbers(parts: Iterable[Any]) -> list[torch.Tensor]:
    """The keys of layers, or what views show."""
    return [(part if isinstance(part, torch.Tensor) else part.keys).clone() for part in parts]


LEFT: dict[str, Callable[[hfkv.KVCache], Any]] = {
    "a fork": lambda cache: cache.fork().layers,
    "a shallow copy": lambda cache: copy.copy(cache).layers,
    "its layers": lambda cache: cache.layers,
    "views": lambda cache: cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 0),
}


@pytest.mark.parametrize(("what", "kv"), [*((what, "none") for what in LEFT), ("a fork", "paged+page_size:4")])
def test_what_is_left_of_a_cache_keeps_its_planes(device: torch.device, what: str, kv: str) -> None:
    model = llama(num_hidden_layers=1).to(device)
    inputs = on(device, {"input_ids": prompt(1, 9)["input_ids"]})
    with hfkv.patch(model, kv, graphs=True) as patch:
        cache = patch.new_cache()
        cache.reserve(40)
        greedy(model, inputs, 4, past_key_values=cache)
        left = LEFT[what](cache)
        before = numbers(left)
        del cache
        greedy(model, on(device, {"input_ids": prompt(1, 11)["input_ids"]}), 4)
        assert all(map(torch.equal, before, numbers(left)))
