"""One row read for all beams and samples, and forks of a prefix."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hfkv
from hfkv.stores import PagedStore
from tests.tiny import greedy, llama, llama_for, prompt

EXPANDED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3},
    "samples": {"num_return_sequences": 4, "do_sample": True},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "groups": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


class PlaneTraffic(TorchDispatchMode):
    """Counts operations that read or write `planes`."""

    def __init__(self, planes: list[torch.Tensor]) -> None:
        super().__init__()
        self.storages = {plane.untyped_storage().data_ptr() for plane in planes}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        self.count += any(part.untyped_storage().data_ptr() in self.storages for part in touched)
        return func(*args, **(kwargs or {}))


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(4)
    fixed = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**inputs, **{**fixed, **options})


@pytest.mark.smoke
@pytest.mark.parametrize("mode", EXPANDED)
@pytest.mark.parametrize("padding", [0, 3])
def test_beams_and_samples_are_those_of_rows_read_one_by_one(
    mode: str, padding: int, rows_read: list[tuple[int, int]]
) -> None:
    model, inputs = llama(), prompt(2, 12, padding)
    expected = run(model, inputs, **EXPANDED[mode])
    with hfkv.patch(model):
        ours = run(model, inputs, **EXPANDED[mode])
    assert rows_read[0] == (2, 12)
    assert rows_read[2][0] > 2
    assert torch.equal(ours.sequences, expected.sequences)
    for mine, theirs in zip(ours.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    if "sequences_scores" in expected:
        torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


def test_hidden_states_and_attentions_come_for_every_beam() -> None:
    model, inputs = llama(), prompt(2, 12, 3)
    options = {"num_beams": 3, "output_hidden_states": True, "output_attentions": True, "output_logits": True}
    model.set_attn_implementation("eager")
    expected = run(model, inputs, **options)
    with hfkv.patch(model):
        ours = run(model, inputs, **options)
    for name in ("hidden_states", "attentions"):
        for mine, theirs in zip(getattr(ours, name), getattr(expected, name), strict=True):
            assert [part.shape for part in mine] == [part.shape for part in theirs]
    # The first step's rows are real tokens of one prompt three times.
    for mine, theirs in zip(ours.hidden_states[0], expected.hidden_states[0], strict=True):
        torch.testing.assert_close(mine[:, 3:], theirs[:, 3:], atol=1e-4, rtol=1e-4)


def test_rows_with_more_than_ids_are_read_one_by_one(rows_read: list[tuple[int, int]]) -> None:
    model, inputs = llama(), prompt(1, 12)
    with hfkv.patch(model):
        hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output)
        run(model, inputs, num_beams=3)
        hook.remove()
    assert rows_read[0] == (3, 12)


@pytest.mark.smoke
@pytest.mark.parametrize("kv", [None, "paged", "int8"])
def test_four_beams_hold_one_prompt(kv: str | None, rows_read: list[tuple[int, int]], monkeypatch: Any) -> None:
    model = llama(max_position_embeddings=16_384)
    length, new_tokens, beams = 8192, 40, 4
    inputs = prompt(1, length)
    bytes_held: list[int] = []
    touched: list[int] = []
    places: set[tuple[int, ...]] = set()
    reorder = hfkv.KVCache.reorder_cache

    def watched(self: hfkv.KVCache, beam_idx: torch.Tensor) -> None:
        bytes_held.append(self.nbytes())
        planes = [plane for leaf in self.leaves for plane in leaf.store.planes]
        places.add(tuple(plane.data_ptr() for plane in planes))
        with PlaneTraffic(planes) as traffic:
            reorder(self, beam_idx)
        touched.append(traffic.count)

    monkeypatch.setattr(hfkv.KVCache, "reorder_cache", watched)
    with hfkv.patch(model, kv) as patch:
        ours = run(model, inputs, num_beams=beams, max_new_tokens=new_tokens)
        cache = ours.past_key_values
        bytes_held.append(cache.nbytes())
        alone = hfkv.KVCache(model, patch.kv)
        with torch.no_grad():
            model(inputs["input_ids"], past_key_values=alone, logits_to_keep=1)
        one_prompt = alone.held_bytes()
    assert rows_read[0] == (1, length)
    assert all(rows == beams for rows, count in rows_read[2:-2] if count == 1)
    assert len(bytes_held) > new_tokens - 3
    assert max(bytes_held) <= 1.15 * one_prompt + beams * new_tokens * one_prompt / length
    assert isinstance(cache.layers[0].store, PagedStore)
    assert set(touched) == {0}
    # The planes were allocated once: no copy of them stood beside them.
    assert len(places) == 1
    if kv != "int8":
        stock = run(model, inputs, num_beams=beams, max_new_tokens=new_tokens)
        assert torch.equal(ours.sequences, stock.sequences)
        torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, atol=1e-4, rtol=1e-4)


# Forks.

STORES = (
    "none",
    "none+contiguous",
    "paged+page_size:4",
    "int8+paged+page_size:4",
    "window:6+sinks:2+paged+page_size:2",
)


def prefix_cache(model: Any, kv: str, inputs: dict[str, torch.Tensor]) -> hfkv.KVCache:
    cache = hfkv.KVCache(model, kv)
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
    return cache


@pytest.mark.parametrize("kv", STORES)
def test_one_prefix_feeds_a_batch_beams_and_samples(kv: str) -> None:
    model, prefix = llama_for(kv), prompt(1, 17)
    torch.manual_seed(2)
    ids = torch.cat((prefix["input_ids"].expand(3, -1), torch.randint(3, 99, (3, 5))), dim=1)
    with hfkv.patch(model, kv):
        batch, beams = greedy(model, {"input_ids": ids}), run(model, {"input_ids": ids[:1]}, num_beams=3)
        cache = prefix_cache(model, kv, prefix)
        for _ in range(2):
            forked = cache.fork(3)
            assert torch.equal(greedy(model, {"input_ids": ids}, past_key_values=forked), batch)
            assert cache.get_seq_length() == 17
        for forked in (cache.fork(), cache.fork(3)):
            ours = run(model, {"input_ids": ids[:1]}, num_beams=3, past_key_values=forked)
            assert torch.equal(ours.sequences, beams.sequences)
        assert cache.holds_tokens is not None
        assert torch.equal(cache.holds_tokens, prefix["input_ids"])


def test_forks_share_pages_and_copy_the_last() -> None:
    model, inputs = llama(), prompt(1, 18)
    cache = prefix_cache(model, "paged+page_size:4", inputs)
    store = cache.layers[0].store
    pages = store.blocks.used
    forks = [cache.fork(2), copy.deepcopy(cache)]
    assert store.blocks.used == pages == 5
    forks[0].update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    assert store.blocks.used == pages + 2
    forks[1].update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    assert store.blocks.used == pages + 2 + 2
    del forks
    assert store.blocks.used == pages
    with pytest.raises(ValueError, match="at least 1"):
        cache.fork(0)
    with pytest.raises(TypeError, match="number of copies"):
        cache.fork("2")  # type: ignore[arg-type]


def test_beams_share_pages() -> None:
    model, held = llama(), {}
    for kv in ("none", "paged+page_size:16"):
        with hfkv.patch(model, kv):
            options = {"num_beams": 8, "return_dict_in_generate": True}
            held[kv] = greedy(model, prompt(1, 300), 100, **options).past_key_values.nbytes()
    assert held["paged+page_size:16"] < 0.35 * held["none"]
