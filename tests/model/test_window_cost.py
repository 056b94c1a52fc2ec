"""What a window costs: work in proportion to the text in a prefill, the same at every step of a generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import hfkv
from tests.tiny import llama

SIZE = 64
KINDS = [
    "window:64",
    "int8+window:64+sink_positions:cache",
    "window:64+summary:mean+summary_page_size:16",
    "paged+window:64",
]


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operations make, and notes the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return result


def prefill(model: Any, kv: str, length: int, padding: int) -> Elements:
    ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with torch.no_grad(), Elements() as elements:
        model(ids, attention_mask=mask, past_key_values=hfkv.KVCache(model, kv), logits_to_keep=1)
    return elements


@pytest.mark.parametrize("padding", [0, 100])
@pytest.mark.parametrize("kv", KINDS)
def test_a_prefill_makes_nothing_of_the_texts_length_squared(kv: str, padding: int) -> None:
    model = llama()
    with hfkv.patch(model, kv):
        short, long = (prefill(model, kv, length, padding) for length in (2048, 8192))
    assert long.largest < 8192 * 8192 / 8
    assert long.largest <= 4.1 * short.largest
    assert long.total <= 4.3 * short.total


def test_a_square_mask_would_be_seen() -> None:
    model = llama()
    model.set_attn_implementation("sdpa")
    assert prefill(model, "none", 2048, 100).largest >= 2048 * 2048


@pytest.mark.parametrize("kv", ["none", "int8", "int4+paged", "fp8"])
def test_without_a_window_a_padded_prefill_makes_no_square_mask_either(kv: str) -> None:
    model = llama()
    with hfkv.patch(model, kv):
        short, long = (prefill(model, kv, length, 100) for length in (2048, 8192))
    assert long.largest < 8192 * 8192 / 8
    assert long.largest <= 4.1 * short.largest


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("kv", KINDS)
def test_a_step_costs_the_same_however_long_the_text(kv: str, padding: int) -> None:
    model = llama()
    ids = torch.randint(3, 99, (2, 4000), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5000, dtype=torch.long)
    mask[0, :padding] = 0
    totals, sizes = [], []
    with torch.no_grad(), hfkv.patch(model, kv):
        cache = hfkv.KVCache(model, kv)
        for first, last in ((0, 300), (364, 3500)):
            model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, logits_to_keep=1)
            # 64 steps: in as many a page fills, a buffer is moved and a page is summarised as often.
            with Elements() as elements:
                for t in range(last, last + 64):
                    # A padded batch's attention mask grows with the text, here as in every generation.
                    known = {"attention_mask": mask[:, : t + 1]} if padding else {}
                    model(ids[:, t : t + 1], position_ids=torch.full((2, 1), t), past_key_values=cache, **known)
            totals.append(elements.total)
            sizes.append(cache.nbytes())
    grown = 64 * 2 * 3200 * 8 if padding else 0  # the mask's own few operations
    assert totals[1] <= 1.05 * totals[0] + grown
    assert sizes[0] == sizes[1]


def test_bytes_are_constant_after_the_window_has_filled() -> None:
    model = llama()
    for kv in KINDS:
        cache = hfkv.KVCache(model, kv)
        sizes = set()
        with torch.no_grad(), hfkv.patch(model, kv):
            model(torch.randint(3, 99, (1, 700)), past_key_values=cache)
            for t in range(700):
                model(torch.tensor([[5]]), past_key_values=cache)
                if t > 350:
                    sizes.add(cache.nbytes())
        assert len(sizes) == 1, f"{kv}: {sizes}"
