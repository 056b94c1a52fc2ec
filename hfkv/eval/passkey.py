"""Pass keys: five digits hidden in real text, to be retrieved at its end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
else:
    Cache = Any  # for typing.get_type_hints, without the import
    PreTrainedModel = Any
    PreTrainedTokenizerBase = Any

NUM_DIGITS = 5
STATEMENT = "\nThe pass key is {key}. Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
MIN_LENGTH = len(STATEMENT.format(key="0" * NUM_DIGITS)) + len(QUESTION)


def pass_key_prompt(rng: random.Random, filler: str, length: int, depth: float | None = None) -> tuple[str, str]:
    """Hide a pass key in a random excerpt of a text and ask for it at the end.

    Args:
        rng: Source of the key, of the excerpt and, where `depth` is None, of the depth.
        filler: ASCII text, at least `length` characters of it.
        length: Bytes of the whole prompt, question included; at least `MIN_LENGTH`.
        depth: Where the key lies, from 0 (at the start) to 1 (just before the question); may be None.

    Returns:
        The prompt, to be continued with the key, and the key.

    Raises:
        ValueError: `length` has no room for the key and the question, or `filler` is too short.
    """
    num_filler = length - MIN_LENGTH
    if num_filler < 0:
        raise ValueError(f"a pass-key prompt takes at least {MIN_LENGTH} bytes, not {length}")
    if len(filler) < num_filler:
        raise ValueError(f"a prompt of {length} bytes needs {num_filler} bytes of filler, not {len(filler)}")
    key = draw_key(rng)
    start = rng.randrange(len(filler) - num_filler + 1)
    excerpt = filler[start : start + num_filler]
    return hide(key, excerpt, rng.random() if depth is None else depth), key


def draw_key(rng: random.Random) -> str:
    """Draws a pass key, `NUM_DIGITS` digits."""
    return "".join(rng.choice("0123456789") for _ in range(NUM_DIGITS))


def hide(key: str, excerpt: str, depth: float) -> str:
    """Composes the prompt: an excerpt with the key told at `depth` of it, 0 to 1, and asked for at the end."""
    cut = round(depth * len(excerpt))
    return excerpt[:cut] + STATEMENT.format(key=key) + excerpt[cut:] + QUESTION


@torch.inference_mode()
def pass_key_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    length: int,
    trials: int = 100,
    seed: int = 0,
    make_cache: Callable[[], Cache] | None = None,
    batch_size: int = 20,
) -> float:
    """Measure how often a byte-level model returns a hidden pass key, by greedy generation.

    The depths are spread evenly over the trials.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, one token per byte, so that all prompts are equally long.
        filler: ASCII text the keys are hidden in.
        length: Bytes of each prompt.
        trials: Number of prompts.
        seed: Seed of keys and excerpts.
        make_cache: Makes a fresh cache for each batch; None is the model's default.
        batch_size: Prompts generated at once.

    Returns:
        The share of prompts continued with all digits of their key, 0 to 1.

    Raises:
        ValueError: `trials` or `batch_size` is below 1, or see `pass_key_prompt`.
    """
    if trials < 1 or batch_size < 1:
        raise ValueError(f"trials and batch_size must be at least 1, got {trials} and {batch_size}")
    rng = random.Random(seed)
    cases = [pass_key_prompt(rng, filler, length, (i + 0.5) / trials) for i in range(trials)]
    num_right = 0
    for start in range(0, trials, batch_size):
        batch = cases[start : start + batch_size]
        inputs = tokenizer([prompt for prompt, _ in batch], return_tensors="pt").to(model.device)
        output = model.generate(
            **inputs,
            past_key_values=make_cache() if make_cache else None,
            max_new_tokens=NUM_DIGITS,
            do_sample=False,
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        num_right += sum(answer == key for answer, (_, key) in zip(answers, batch, strict=True))
    return num_right / trials
