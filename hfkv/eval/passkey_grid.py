"""A grid of pass keys: how often they are found, by where they lie and how long the text is, with any tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from hfkv.eval.passkey import NUM_DIGITS, draw_key, hide
from hfkv.patches.keys.means import wants_means
from hfkv.patches.patch import patch
from hfkv.policy.config import KVConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any  # for typing.get_type_hints, without the import

# How often a prompt's length is corrected: an excerpt cut out of a text may take a token more or fewer inside another.
MAX_CORRECTIONS = 4

_Case = tuple[int, list[int], str]  # row of the grid, prompt, key


@torch.inference_mode()
def pass_key_grid(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 5,
    kv: KVConfig | str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    calibration: Any = None,
) -> torch.Tensor:
    """Measure how often a model returns a hidden pass key, by greedy generation, for every depth and length.

    The prompts depend on the seed, the tokenizer and the cell only: every cache is asked the same. Only prompts of
    equally many tokens share a batch, so none is padded.

    Args:
        model: A causal language model, or a `PeftModel` around one.
        tokenizer: Its tokenizer, of any kind.
        filler: The text the keys are hidden in; at least as many tokens as the longest prompt.
        lengths: Tokens of the prompts, special ones included; reached as nearly as the tokenizer allows, not exceeded.
        depths: Where the keys lie, 0 (at the start) to 1 (just before the question); see `even_depths`.
        trials: Prompts a cell.
        kv: The cache; None takes the model as it is, patched or not.
        seed: Seed of keys and excerpts.
        batch_size: Prompts generated at once.
        on_tokens: Called after each batch with how many tokens its prompts had.
        calibration: What the mean of keys is taken over, where a codec takes one; see `hfkv.patch`.

    Returns:
        The share of prompts continued with all digits of their key, 0 to 1, [depths, lengths], fp32, on the CPU.

    Raises:
        ValueError: A number is out of range, `filler` is too short, a length has no room for the key and the
            question, or `kv` does not fit the model.
        RuntimeError: `kv` is given and the model is patched already.
    """
    if trials < 1 or batch_size < 1 or not lengths or not depths:
        raise ValueError(
            f"trials and batch_size must be at least 1, with a length and a depth at least, got trials={trials}, "
            f"batch_size={batch_size}, lengths={list(lengths)}, depths={list(depths)}"
        )
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths are shares of the text, 0 to 1, got {list(depths)}")
    filler_ids = tokenizer(filler, add_special_tokens=False, verbose=False)["input_ids"]
    found = torch.zeros(len(depths), len(lengths))
    calibration = calibration if kv is not None and wants_means(KVConfig.of(kv)) else None
    with patch(model, kv, calibration=calibration) if kv is not None else nullcontext():
        for column, length in enumerate(lengths):
            cases = []
            for row, depth in enumerate(depths):
                for trial in range(trials):
                    rng = random.Random(f"{seed} {length} {float(depth)} {trial}")
                    cases.append((row, *token_prompt(rng, tokenizer, filler_ids, length, depth)))
            for batch in _batches(cases, batch_size):
                answers = _answers(model, tokenizer, [ids for _, ids, _ in batch])
                for (row, _, key), answer in zip(batch, answers, strict=True):
                    found[row, column] += answer.startswith(key)
                on_tokens(sum(len(ids) for _, ids, _ in batch))
    return found / trials


def even_depths(count: int) -> list[float]:
    """Spreads `count` depths from the start, 0, to just before the question, 1; a single one is in the middle.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"there must be at least 1 depth, got {count}")
    return [index / (count - 1) for index in range(count)] if count > 1 else [0.5]


def token_prompt(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, filler_ids: Sequence[int], length: int, depth: float
) -> tuple[list[int], str]:
    """Hide a pass key in a random excerpt of a text and ask for it at the end, in a given number of tokens.

    The prompt is composed as text and read by the tokenizer as a whole, as a user's would be.

    Args:
        rng: Source of the key and of the excerpt.
        tokenizer: Any tokenizer; its special tokens count.
        filler_ids: The text the key is hidden in, as at least `length` tokens without special ones.
        length: Tokens of the prompt.
        depth: Where the key lies, 0 to 1.

    Returns:
        The prompt, to be continued with the key, and the key. The prompt has `length` tokens, or fewer where no
        excerpt that was tried gives as many.

    Raises:
        ValueError: `length` has no room for the key and the question, or `filler_ids` are too few.
    """
    if len(filler_ids) < length:
        raise ValueError(
            f"a pass-key prompt of {length} tokens needs a text of as many; this one has {len(filler_ids)}. Give a "
            "longer text or a smaller length"
        )
    key = draw_key(rng)
    start = rng.randrange(len(filler_ids) - length + 1)

    def prompt(num_filler: int) -> list[int]:
        excerpt = tokenizer.decode(filler_ids[start : start + num_filler], clean_up_tokenization_spaces=False)
        return _encode(tokenizer, hide(key, str(excerpt), depth))

    best = prompt(0)
    if len(best) > length:
        raise ValueError(f"a pass-key prompt takes at least {len(best)} tokens of this tokenizer, not {length}")
    num_filler = length - len(best)
    for _ in range(MAX_CORRECTIONS):
        ids = prompt(num_filler)
        if len(best) < len(ids) <= length:
            best = ids
        if len(ids) == length:
            break
        num_filler += length - len(ids)
    return best, key


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that digits follow: many tokenizers join its last space with the first of them."""
    one, other = (tokenizer(text + digit, verbose=False)["input_ids"] for digit in "05")
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _batches(cases: list[_Case], batch_size: int) -> Iterator[list[_Case]]:
    """Cases whose prompts have equally many tokens, up to `batch_size` at once."""
    by_length: dict[int, list[_Case]] = {}
    for case in cases:
        by_length.setdefault(len(case[1]), []).append(case)
    for same in by_length.values():
        yield from (same[start : start + batch_size] for start in range(0, len(same), batch_size))


def _answers(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> list[str]:
    """What the model writes after prompts of equal length: the digits, and a token more for a space before them."""
    ids = torch.tensor(prompts, device=model.device)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)), 0)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_DIGITS + 1,
        # Said outright: the generation config saved with a model may ask for something else.
        do_sample=False,
        num_beams=1,
        use_cache=True,
        cache_implementation="dynamic",
        pad_token_id=pad,
    )
    answers: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
