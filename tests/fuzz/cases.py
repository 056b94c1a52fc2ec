"""A call of `generate`, drawn from a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

MODES = {
    "greedy": 4,
    "sample": 4,
    "beams": 4,
    "beam sample": 2,
    "lookup": 2,
    "assisted": 2,
}
OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
# Where a cache comes from: a fresh one a call, one of the user's own, the one that the first turn returned.
CACHES = {"fresh": 6, "own": 2, "returned": 1}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, or two turns of one.

    Attributes:
        seed: of the prompt, and of what is drawn in the call.
        pads: pad tokens on the left of each row; its length is the number of rows.
        length: columns of the prompt.
        options: keywords of `generate` that are plain values.
        objects: what else is given: "streamer", "processor", "criteria", "prefix function", "assistant", "negative",
            "embeds".
        decoder_tokens: tokens that an encoder-decoder's text begins with, 0 for none given.
        cache: one of `CACHES`.
        turns: 1 or 2.
    """

    seed: int
    pads: tuple[int, ...]
    length: int
    options: dict[str, Any]
    objects: tuple[str, ...] = ()
    decoder_tokens: int = 0
    cache: str = "fresh"
    turns: int = 1

    @property
    def rows(self) -> int:
        return len(self.pads)


def draw(seed: int) -> Case:
    """The case of a seed: the same on every machine."""
    rng = random.Random(seed)
    mode = _pick(rng, MODES)
    rows = 1 if mode in ("lookup", "assisted") and rng.random() < 0.95 else rng.randint(1, 3)
    length = rng.randint(2, 12)
    has_padding = rng.random() < 0.6
    pads = tuple(rng.randint(0, length - 1) if has_padding else 0 for _ in range(rows))
    options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 7)} | _mode_options(rng, mode)
    for name, (chance, value) in _OPTIONS.items():
        if rng.random() < chance:
            options[name] = value(rng)
    if "min_new_tokens" in options:
        options["min_new_tokens"] = min(options["min_new_tokens"], options["max_new_tokens"])
    objects = [name for name, chance in _OBJECTS.items() if rng.random() < chance]
    if mode == "assisted":
        objects.append("assistant")
    if "negative" in objects:
        options["guidance_scale"] = 1.5
    if rng.random() < 0.4:
        options["return_dict_in_generate"] = True
        for name in OUTPUTS:
            if rng.random() < 0.4:
                options[name] = True
    cache = _pick(rng, CACHES)
    is_alone = not {"num_beams", "num_return_sequences"} & options.keys()
    turns = 2 if is_alone and rng.random() < 0.35 else 1
    if cache == "returned":
        if is_alone:
            turns = 2
            options["return_dict_in_generate"] = True
        else:
            cache = "fresh"
    if "embeds" in objects:  # the first turn's text would be lost
        turns, cache = 1, "fresh" if cache == "returned" else cache
    if turns == 2 and mode in ("lookup", "assisted"):  # see `calls.run`: other queries are read
        options = {name: value for name, value in options.items() if name not in OUTPUTS[2:]}
    if "use_cache" in options:  # with a cache besides, stock code loses tokens
        turns, cache = 1, "fresh"
    decoder_tokens = rng.choice((0, 0, 1, 2, 4))
    return Case(seed, pads, length, options, tuple(objects), decoder_tokens, cache, turns)


def smaller(case: Case) -> Iterator[Case]:
    """Cases that ask a little less: what is left when none of them fails any more is what to look at."""
    if case.turns == 2 and case.cache != "returned":
        yield dataclasses.replace(case, turns=1)
    if case.cache == "own":
        yield dataclasses.replace(case, cache="fresh")
    for name in case.objects:
        yield dataclasses.replace(case, objects=tuple(other for other in case.objects if other != name))
    for name in case.options:
        if name != "max_new_tokens":
            yield dataclasses.replace(case, options={k: v for k, v in case.options.items() if k != name})
    if case.decoder_tokens:
        yield dataclasses.replace(case, decoder_tokens=0)
    if any(case.pads):
        yield dataclasses.replace(case, pads=(0,) * case.rows)
    if case.rows > 1:
        yield dataclasses.replace(case, pads=case.pads[:1])
        yield dataclasses.replace(case, pads=case.pads[1:])


def _pick(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(3, 89), count)


def _mode_options(rng: random.Random, mode: str) -> dict[str, Any]:
    options: dict[str, Any] = {"do_sample": mode in ("sample", "beam sample")}
    if mode in ("lookup", "assisted") and rng.random() < 0.3:
        options["do_sample"] = True
    if "beam" in mode:
        options["num_beams"] = rng.randint(2, 4)
        if rng.random() < 0.5:
            options["num_return_sequences"] = rng.randint(1, options["num_beams"])
        if rng.random() < 0.5:
            options["length_penalty"] = rng.choice((-1.0, 0.0, 0.5, 2.0))
        if rng.random() < 0.5:
            options["early_stopping"] = rng.choice((True, False, "never"))
    elif mode == "sample" and rng.random() < 0.4:
        options["num_return_sequences"] = rng.randint(2, 3)
    elif mode == "lookup":
        options["prompt_lookup_num_tokens"] = rng.randint(1, 4)
        if rng.random() < 0.5:
            options["max_matching_ngram_size"] = rng.randint(1, 3)
    elif mode == "assisted" and rng.random() < 0.3:
        options["assistant_confidence_threshold"] = 0.3
    if options["do_sample"]:
        for name, values in _SAMPLING.items():
            if rng.random() < 0.25:
                options[name] = rng.choice(values)
    return options


_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (0.5, 2.0),
    "top_k": (1, 5, 30),
    "top_p": (0.3, 0.9),
    "min_p": (0.05,),
    "typical_p": (0.8,),
    "epsilon_cutoff": (0.01,),
    "eta_cutoff": (0.01,),
}
# Keyword of `generate`: how often, and what.
_OPTIONS: dict[str, tuple[float, Callable[[random.Random], Any]]] = {
    "min_new_tokens": (0.3, lambda rng: rng.randint(1, 5)),
    "eos_token_id": (0.4, lambda rng: _tokens(rng, 25)),
    "repetition_penalty": (0.15, lambda rng: rng.choice((0.8, 1.3))),
    "encoder_repetition_penalty": (0.05, lambda rng: 1.3),
    "no_repeat_ngram_size": (0.15, lambda rng: rng.randint(1, 3)),
    "bad_words_ids": (0.08, lambda rng: [[token] for token in _tokens(rng, 5)]),
    "suppress_tokens": (0.08, lambda rng: _tokens(rng, 10)),
    "begin_suppress_tokens": (0.05, lambda rng: _tokens(rng, 10)),
    "forced_bos_token_id": (0.04, lambda rng: rng.randint(3, 88)),
    "forced_eos_token_id": (0.04, lambda rng: rng.randint(3, 88)),
    "exponential_decay_length_penalty": (0.05, lambda rng: (2, 1.2)),
    "sequence_bias": (0.05, lambda rng: [[[token], 5.0] for token in _tokens(rng, 4)]),
    "renormalize_logits": (0.08, lambda rng: True),
    "remove_invalid_values": (0.05, lambda rng: True),
    "guidance_scale": (0.06, lambda rng: rng.choice((1.5, 3.0))),
    "prefill_chunk_size": (0.2, lambda rng: rng.randint(1, 6)),
    "use_cache": (0.08, lambda rng: False),
    "cache_implementation": (0.06, lambda rng: rng.choice(("dynamic", "static", "offloaded", "dynamic_full"))),
    "disable_compile": (0.05, lambda rng: True),
}
_OBJECTS = {
    "streamer": 0.1,
    "processor": 0.12,
    "criteria": 0.1,
    "prefix function": 0.06,
    "negative": 0.05,
    "embeds": 0.1,
    "no mask": 0.1,
}
