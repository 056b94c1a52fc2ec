"""What the codecs cost the bundled model: recorded numbers with a margin. Random weights cannot be wrong; these can.

docs/understand/tiny-lm.md has the numbers over the whole held-out text.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hfkv
from hfkv import tiny_lm
from hfkv.eval import LossReport, held_out_loss, pass_key_accuracy, top1_agreement

NUM_BYTES, CONTEXT = 48 * 1024, 512


@pytest.fixture(scope="module")
def bundled() -> Iterator[tuple[Any, Any, torch.Tensor]]:
    # fp32 arithmetic: in bf16 the rounding of the weights' products hides what an 8-bit codec does.
    model, tokenizer = tiny_lm.load(torch.float32)
    ids = tokenizer(tiny_lm.held_out_text(), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    with hfkv.patch(model):
        yield model, tokenizer, ids


@pytest.fixture(scope="module")
def full(bundled: tuple[Any, Any, torch.Tensor]) -> LossReport:
    model, _, ids = bundled
    return held_out_loss(model, ids[:NUM_BYTES], CONTEXT)


def test_the_bundled_model_predicts_text_it_has_not_seen(bundled: tuple[Any, Any, torch.Tensor]) -> None:
    model, _, ids = bundled
    report = held_out_loss(model, ids, CONTEXT)
    assert report.num_tokens == 168_758
    assert report.nats <= 0.88  # 0.8759 was measured in bfloat16


@pytest.mark.parametrize(
    ("kv", "loss_change", "agreement"),
    [
        ("int8", 0.0005, 0.995),
        ("fp8", 0.005, 0.97),
        ("int4", 0.015, 0.93),
        pytest.param("int3", 0.037, 0.92, marks=pytest.mark.slow),
    ],
)
def test_codecs_cost_little(
    bundled: tuple[Any, Any, torch.Tensor], full: LossReport, kv: str, loss_change: float, agreement: float
) -> None:
    model, _, ids = bundled
    lossy = held_out_loss(model, ids[:NUM_BYTES], CONTEXT, make_cache=lambda: hfkv.KVCache(model, kv))
    assert abs(lossy.nats / full.nats - 1) <= loss_change
    assert agreement <= top1_agreement(lossy, full) < 1


@pytest.mark.slow
def test_pass_keys_of_2048_bytes_are_found_in_three_bits(bundled: tuple[Any, Any, torch.Tensor]) -> None:
    model, tokenizer, _ = bundled
    full, int3 = (
        pass_key_accuracy(
            model, tokenizer, tiny_lm.held_out_text(), 2048, trials=10, make_cache=lambda kv=kv: hfkv.KVCache(model, kv)
        )
        for kv in ("none", "int3")
    )
    # 9 and 10 of 10 were found, and 19 each of 20.
    assert int3 >= full - 0.1 >= 0.8


def test_a_lossless_cache_costs_nothing(bundled: tuple[Any, Any, torch.Tensor], full: LossReport) -> None:
    model, _, ids = bundled
    exact = held_out_loss(model, ids[: 4 * CONTEXT], CONTEXT, make_cache=lambda: hfkv.KVCache(model))
    assert torch.equal(exact.predictions, full.predictions[: 4 * CONTEXT])


@pytest.mark.parametrize("kv", ["none", "int8", "int4+paged"])
def test_pass_keys_are_found(bundled: tuple[Any, Any, torch.Tensor], kv: str) -> None:
    model, tokenizer, _ = bundled
    found = pass_key_accuracy(
        model, tokenizer, tiny_lm.held_out_text(), 512, trials=40, make_cache=lambda: hfkv.KVCache(model, kv)
    )
    assert found >= 0.95


def test_a_window_loses_what_left_it(bundled: tuple[Any, Any, torch.Tensor]) -> None:
    model, tokenizer, _ = bundled

    def accuracy(kv: str) -> float:
        return pass_key_accuracy(
            model, tokenizer, tiny_lm.held_out_text(), 512, trials=20, make_cache=lambda: hfkv.KVCache(model, kv)
        )

    assert accuracy("window:512") >= 0.95
    assert accuracy("window:64") <= 0.3
