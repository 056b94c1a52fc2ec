"""Every index that transformers' cache takes, ours takes; what it refuses is refused, and says the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
)

import hfkv
from hfkv import KVCache
from tests.tiny import feed, llama_config

pytestmark = pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")

BATCH, TOKENS = 4, 5
KINDS = ["none", "int8+paged+page_size:2", "int4+offload", "fp8+window:3+sinks:1+paged", "none+window:3", "auto"]
INDICES: dict[str, Any] = {
    "tuple": (0, 2),
    "list": [3, 0, 0],
    "negative": [-1, -4],
    "range": range(1, 3),
    "array": np.array([2, 1]),
    "bool array": np.array([True, False, True, False]),
    "int32": torch.tensor([1, 3], dtype=torch.int32),
    "uint8 mask": torch.tensor([1, 0, 0, 1], dtype=torch.uint8),
    "mask": torch.tensor([False, True, True, True]),
    "list of bools": [True, True, False, False],
    "slice": slice(1, None, 2),
    "no slice": slice(None),
    "tensors": [torch.tensor(2), torch.tensor(0)],
    "none": [],
    "no positions": torch.tensor([], dtype=torch.long),
    "nothing": slice(0, 0),
    "mask of nothing": torch.zeros(BATCH, dtype=torch.bool),
    "twice as many": [0, 1, 2, 3, 3, 2, 1, 0],
    "beyond": [BATCH],
    "far below": [-BATCH - 1],
    "floats": torch.tensor([0.0, 1.0]),
    "a short mask": torch.tensor([True, False]),
    "backwards": slice(None, None, -1),
    "a word": "0",
}
BEAMS: dict[str, Any] = {
    "int64": torch.tensor([2, 2, 0, 1]),
    "int32": torch.tensor([3, 1], dtype=torch.int32),
    "one": torch.tensor(2),
    "none": torch.tensor([], dtype=torch.long),
    "negative": torch.tensor([-1, 0]),
    "mask": torch.tensor([True, False, True, False]),
    "list": [0, 1],
    "two dimensions": torch.tensor([[0, 1]]),
    "floats": torch.tensor([0.0]),
}
REPEATS: dict[str, Any] = {
    "int": 2,
    "none": 0,
    "numpy": np.int64(3),
    "of each": torch.tensor([0, 2, 1, 1]),
    "tensor": torch.tensor(2),
    "negative": -1,
    "float": 1.5,
    "list": [1, 2, 0, 1],
    "too few": torch.tensor([1, 2]),
}
CROPS: dict[str, Any] = {
    "int": -2,
    "none": 0,
    "numpy": np.int64(-1),
    "tensor": torch.tensor(-3),
    "all": -TOKENS,
    "more": -TOKENS - 2,
}


def caches(kv: str) -> tuple[DynamicCache, hfkv.KVCache]:
    """Both with the same tokens: what tells rows apart is in every number."""
    config = llama_config()
    ours = hfkv.KVCache(config, "none" if kv == "auto" else kv)
    if kv == "auto":
        ours.expect_copies(2, TOKENS)
    states = torch.arange(float(BATCH)).view(BATCH, 1, 1, 1) + torch.arange(TOKENS).view(TOKENS, 1).expand(-1, 16) / 100
    pair = (DynamicCache(config=config), ours)
    for cache in pair:
        for index in range(config.num_hidden_layers):
            cache.update(states.expand(BATCH, 2, -1, -1), -states.expand(BATCH, 2, -1, -1), index)
    return pair


def outcome(cache: Any, call: Callable[[Any], Any]) -> Any:
    """Which rows a call leaves, or the error it raises."""
    try:
        call(cache)
    except Exception as error:
        return error
    layers = cache.layers if hasattr(cache, "layers") else cache.self_attention_cache.layers
    return [(layer.keys.shape, layer.keys[..., -1:, :1].round().flatten(1).tolist()) for layer in layers]


def agree(kv: str, call: Callable[[Any], Any], wrap: Callable[[Any], Any] = lambda cache: cache) -> None:
    stock, ours = (outcome(wrap(cache), call) for cache in caches(kv))
    if isinstance(stock, Exception):
        assert isinstance(ours, type(stock)), ours
        return
    assert not isinstance(ours, Exception), ours
    for (shape, rows), (our_shape, our_rows) in zip(stock, ours, strict=True):
        assert (our_shape[:2], our_shape[3]) == (shape[:2], shape[3])
        assert our_shape[2] == shape[2] or "window" in kv
        assert our_rows == rows


@pytest.mark.parametrize("kv", KINDS)
def test_rows_are_kept_as_transformers_keeps_them(kv: str) -> None:
    for name, indices in INDICES.items():
        try:
            agree(kv, lambda cache, indices=indices: cache.batch_select_indices(indices))
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("kv", KINDS)
def test_rows_are_reordered_and_repeated_as_transformers_does(kv: str) -> None:
    for name, beams in BEAMS.items():
        try:
            agree(kv, lambda cache, beams=beams: cache.reorder_cache(beams))
        except AssertionError as error:
            raise AssertionError(name) from error
    for name, repeats in REPEATS.items():
        try:
            agree(kv, lambda cache, repeats=repeats: cache.batch_repeat_interleave(repeats))
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("kv", [kind for kind in KINDS if "window" not in kind])
def test_tokens_are_removed_as_transformers_does(kv: str) -> None:
    for name, tokens in CROPS.items():
        try:
            agree(kv, lambda cache, tokens=tokens: cache.crop(tokens))
        except AssertionError as error:
            raise AssertionError(name) from error


def test_inside_an_encoder_decoder_cache() -> None:
    def both(cache: Any) -> EncoderDecoderCache:
        return EncoderDecoderCache(cache, DynamicCache())

    for indices in ((0, 2), np.array([1]), [-1], slice(0, 2)):
        agree("int8", lambda cache, indices=indices: cache.batch_select_indices(indices), both)


@pytest.mark.parametrize("indices", [1, torch.tensor(1), None, True, [[0, 1], [1, 0]]])
def test_what_leaves_no_batch_of_rows_is_refused_and_changes_nothing(indices: Any) -> None:
    _, ours = caches("none")
    before = ours.layers[0].keys.clone()
    with pytest.raises(IndexError, match=r"of a single row: \[row\]"):
        ours.batch_select_indices(indices)
    assert torch.equal(ours.layers[0].keys, before)


def test_the_tokens_written_down_are_selected_alike() -> None:
    for indices, rows in (((0, 2), [0, 2]), (np.array([-1]), [3]), ([True, False, False, True], [0, 3])):
        _, ours = caches("none")
        ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)
        ours.record.append(ids, TOKENS)
        ours.batch_select_indices(indices)
        assert torch.equal(ours.holds_tokens, ids[rows])


@pytest.mark.parametrize("kv", ["none", "paged"])
@pytest.mark.parametrize(
    "index", [torch.tensor([-1]), [0, 1], slice(1, 3), torch.tensor([True, False, True, False])], ids=str
)
def test_rows_are_selected_as_tensors_are_indexed(kv: str, index: Any) -> None:
    cache = KVCache(llama_config(), kv)
    feed(cache, 4, 5)
    keys = cache.layers[0].keys
    cache.batch_select_indices(index)
    assert torch.equal(cache.layers[0].keys, keys[index])
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([9]))


@pytest.mark.parametrize(
    ("tokens", "reserved", "kv", "is_paged"),
    [
        (64, 100, "none", False),
        (64, 2000, "none", True),
        (600, 0, "int8", True),
        (600, 700, "window:64", False),
        (600, 700, "none+contiguous", False),
        (64, 100, "none+paged", True),
    ],
)
def test_rows_to_be_copied_take_pages_where_they_are_to_be_long(
    tokens: int, reserved: int, kv: str, is_paged: bool
) -> None:
    """Where short rows are copied, block tables take longer than the bytes do."""
    config = llama_config(num_hidden_layers=1, max_position_embeddings=4096)
    announced, repeated = KVCache(config, kv), KVCache(config, kv)
    announced.expect_copies(4, tokens)
    for cache in (announced, repeated):
        cache.reserve(reserved)
        feed(cache, 1, tokens)
        cache.batch_repeat_interleave(4)
        assert cache.layers[0].store.is_paged == is_paged
        capacity = cache.nbytes()
        feed(cache, 4, 1)
        assert cache.get_seq_length() == tokens + 1
        assert is_paged or "window" in kv or cache.nbytes() == capacity
