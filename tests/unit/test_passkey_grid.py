"""Grids of pass keys: with one token a byte and with any tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
)

from hfkv import tiny_lm
from hfkv.eval import (
    even_depths,
    pass_key_grid,
)
from hfkv.eval.passkey_grid import token_prompt
from tests.tiny import llama


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return tiny_lm.load(torch.float32)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens have several characters and join a space with what follows, as GPT-2's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator([tiny_lm.held_out_text()[:20_000], " 1 2 3 4 5 6 7 8 9 0" * 500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_a_window_finds_the_keys_that_lie_in_it(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    text = tiny_lm.held_out_text()
    read: list[int] = []
    grid = pass_key_grid(
        model, tokenizer, text, [256, 512], even_depths(3), 4, "window:160", batch_size=3, on_tokens=read.append
    )
    assert grid.shape == (3, 2)
    assert grid[0].tolist() == [0, 0]  # at the start
    assert grid[1].tolist()[1] == 0
    assert grid[2].tolist() == [1, 1]  # just before the question
    assert sum(read) == (256 + 512) * 3 * 4
    assert not hasattr(model, "hfkv")
    full = pass_key_grid(model, tokenizer, text, [256], even_depths(3), 4)
    assert full.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_prompt_has_the_tokens_asked_for_and_the_key_at_its_depth(bundled: tuple[Any, Any], depth: float) -> None:
    tokenizer = bundled[1]
    filler = tokenizer(tiny_lm.held_out_text()[:5000], add_special_tokens=False, verbose=False)["input_ids"]
    prompt, key = token_prompt(random.Random(0), tokenizer, filler, 300, depth)
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert len(prompt) == 300
    assert prompt[0] == tokenizer.bos_token_id
    statement = f"\nThe pass key is {key}. Remember it.\n"
    before, after = text.split(statement)
    assert after.endswith("The pass key is ")
    num_filler = 299 - len(statement) - len("\nWhat is the pass key? The pass key is ")
    assert len(before) == round(depth * num_filler)


def test_prompts_of_any_tokenizer_are_as_long_as_asked_or_nearly() -> None:
    tokenizer = bpe_tokenizer()
    text = tiny_lm.held_out_text()[:20_000]
    filler = tokenizer(text)["input_ids"]
    assert len(filler) < len(text) / 1.5
    lengths = []
    for seed in range(12):
        prompt, key = token_prompt(random.Random(seed), tokenizer, filler, 200, 0.5)
        lengths.append(len(prompt))
        whole = tokenizer.decode(prompt)
        assert f"The pass key is {key}." in whole
        # This tokenizer joins a space with the digit behind it: the prompt leaves the space to the model.
        assert whole.endswith("The pass key is")
        assert tokenizer(whole + " " + key)["input_ids"][: len(prompt)] == prompt
    assert max(lengths) == 200
    assert min(lengths) >= 195


def test_any_tokenizer_can_be_measured() -> None:
    tokenizer = bpe_tokenizer()
    model = llama(vocab_size=400)
    grid = pass_key_grid(model, tokenizer, tiny_lm.held_out_text()[:20_000], [120], [0.5], 5, "int8")
    assert grid.tolist() == [[0]]  # random weights know no key


def test_an_answer_counts_with_a_space_before_it(bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from hfkv.eval import passkey_grid

    model, tokenizer = bundled
    keys = iter(["00000"] * 2)
    monkeypatch.setattr(passkey_grid, "draw_key", lambda rng: next(keys))
    answer = torch.tensor([[*tokenizer(" 00000", add_special_tokens=False)["input_ids"]]] * 2)
    monkeypatch.setattr(model, "generate", lambda input_ids, **rest: torch.cat([input_ids, answer], dim=1))
    assert pass_key_grid(model, tokenizer, tiny_lm.held_out_text(), [150], [0.5], 2).item() == 1


def test_what_no_grid_can_hold_is_refused(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    with pytest.raises(ValueError, match="at least 1"):
        pass_key_grid(model, tokenizer, "text", [100], [0.5], trials=0)
    with pytest.raises(ValueError, match="0 to 1"):
        pass_key_grid(model, tokenizer, "text", [100], [50])
    with pytest.raises(ValueError, match="a longer text"):
        pass_key_grid(model, tokenizer, "text", [100], [0.5])
    with pytest.raises(ValueError, match="takes at least 7"):
        pass_key_grid(model, tokenizer, "text " * 50, [20], [0.5])
    with pytest.raises(ValueError, match="at least 1"):
        even_depths(0)


@pytest.mark.parametrize(("count", "depths"), [(1, [0.5]), (2, [0, 1]), (5, [0, 0.25, 0.5, 0.75, 1])])
def test_depths_are_even(count: int, depths: list[float]) -> None:
    assert even_depths(count) == depths
