"""Where the rows of a forward begin, for the mean of their keys: a row gives what it gives alone, however it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hfkv
from hfkv.patches.handle import Patch
from tests.tiny import llama, text

LENGTH, PAD = 40, 9
IDS = text(2, LENGTH)
MASK = (torch.arange(LENGTH) >= torch.tensor([0, PAD])[:, None]).long()
POSITIONS = (MASK.cumsum(-1) - 1).clamp_min(0)


@pytest.fixture
def model() -> Iterator[Any]:
    # In float64, so that no code falls the other way.
    model = llama().double()
    with torch.no_grad(), hfkv.patch(model, "int4"):
        yield model


def handle(model: Any) -> Patch:
    return model.hfkv


def alone(model: Any) -> torch.Tensor:
    return model(IDS[1:, PAD:], past_key_values=handle(model).new_cache()).logits[0]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-9 * other.abs().max())


def test_positional_arguments_say_where_rows_begin(model: Any) -> None:
    given = model(IDS, MASK, POSITIONS, handle(model).new_cache())
    assert close(given.logits[1, PAD:], alone(model))
    assert close(model(IDS, MASK, POSITIONS).logits[1, PAD:], alone(model))


@pytest.mark.parametrize("counts", [(LENGTH,), (4, 20, 16), (PAD, LENGTH - PAD), (1, 1, 38)])
def test_a_mask_of_four_dimensions_says_it_too(model: Any, counts: tuple[int, ...]) -> None:
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    full = ((causal[None] & MASK.bool()[:, None]) | torch.eye(LENGTH).bool())[:, None]
    cache, parts, first = handle(model).new_cache(), [], 0
    for count in counts:
        now, last = slice(first, first + count), first + count
        mask = full[:, :, now, :last]
        parts.append(model(IDS[:, now], mask, POSITIONS[:, now], cache).logits)
        first = last
    assert close(torch.cat(parts, 1)[1, PAD:], alone(model))


def test_padding_on_the_right_does_not_move_a_row(model: Any) -> None:
    mask = torch.ones(2, LENGTH).long()
    mask[1, 25:] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = handle(model).new_cache()
    ours = model(IDS, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[1, :25]
    assert close(ours, model(IDS[1:, :25], past_key_values=handle(model).new_cache()).logits[0])


def test_what_is_held_stays_where_it_was_written(model: Any) -> None:
    cache = handle(model).new_cache()
    held = slice(None, 30)
    inner = {"attention_mask": MASK[:, held], "position_ids": POSITIONS[:, held], "past_key_values": cache}
    model.model(IDS[:, held], **inner)  # of which the patch knows nothing
    before = cache.layers[0].keys.clone()
    model(IDS[:, 30:], attention_mask=MASK, position_ids=POSITIONS[:, 30:], past_key_values=cache)
    assert torch.equal(cache.layers[0].keys[:, :, held], before)


def test_a_row_cropped_into_its_padding_begins_anew(model: Any) -> None:
    cache, other = handle(model).new_cache(), handle(model).new_cache()
    mask = MASK.clone()
    mask[1, 3:] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(IDS[:, :12], attention_mask=MASK[:, :12], position_ids=POSITIONS[:, :12], past_key_values=cache)
    cache.crop(-9)
    model(IDS[:, :3], attention_mask=mask[:, :3], position_ids=positions[:, :3], past_key_values=other)
    given = {"attention_mask": mask, "position_ids": positions[:, 3:]}
    ours = model(IDS[:, 3:], **given, past_key_values=cache).logits
    assert close(ours, model(IDS[:, 3:], **given, past_key_values=other).logits)


def test_rows_far_apart_take_little_memory(model: Any) -> None:
    positions = torch.tensor([0, 5_000_000])[:, None] + torch.arange(LENGTH)
    cache = handle(model).new_cache()
    model(IDS, position_ids=positions, past_key_values=cache)
    waves = cache.layers[0].mean.waves
    assert all(len(cos) < 1000 for *_, cos, _ in waves._known)


def test_keys_that_are_not_finite_have_no_mean(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.model.embed_tokens.weight.data[98] = float("nan")
    with hfkv.patch(model, "int4", calibration=torch.tensor([5, 98, 7])) as handle:
        assert handle.key_means == {}
        assert "not finite" in str(handle.no_means)
        assert model(torch.randint(3, 90, (1, 20))).logits.isfinite().all()
