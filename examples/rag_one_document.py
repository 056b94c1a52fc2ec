"""One document, many questions: read it once, then fork its cache for every question.

    python examples/rag_one_document.py [--model PATH]

Eight numbers are hidden in a document, and each question gives the first two digits of one and asks for the rest. They
are asked one by one and as one batch, with and without sharing the document. A table shows the time, the tokens read,
the bytes of all caches together and how many answers were right; all four ways must give the same answers.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfkv
from hfkv import tiny_lm
from hfkv.eval.passkey import NUM_DIGITS, QUESTION, STATEMENT

DIGITS = "0123456789"
NUM_FACTS = 8
GIVEN = 2  # digits of a number that its question tells
DOCUMENT_BYTES = 1800
console = Console()


@dataclass
class Way:
    """Of asking all questions, and what came of it."""

    name: str
    seconds: float = 0.0
    tokens_read: int = 0
    nbytes: int = 0
    answers: list[str] = field(default_factory=list)


def write_document(rng: random.Random) -> tuple[str, list[str]]:
    """A text with some numbers in it, and the numbers."""
    # No two begin with the same digit.
    numbers = [first + "".join(rng.choices(DIGITS, k=NUM_DIGITS - 1)) for first in rng.sample(DIGITS, NUM_FACTS)]
    facts = [STATEMENT.format(key=number) for number in numbers]
    size = (DOCUMENT_BYTES - sum(map(len, facts))) // (NUM_FACTS + 1)
    text = tiny_lm.held_out_text()
    between = [text[i * size : (i + 1) * size] for i in range(NUM_FACTS + 1)]
    return "".join(part + fact for part, fact in zip(between, [*facts, ""], strict=True)), numbers


class Asker:
    """Asks a patched model questions about one document.

    Args:
        model, tokenizer: a causal language model, patched, and its tokenizer.
        document: the text.
        questions: to be continued with the answers.
    """

    def __init__(self, model: Any, tokenizer: Any, document: str, questions: list[str]) -> None:
        self.model, self.tokenizer = model, tokenizer
        # By themselves, so that the document's tokens are the same in front of every question.
        self.document = tokenizer(document, return_tensors="pt").input_ids.to(model.device)
        self.questions = [self._encode(question) for question in questions]

    def _encode(self, question: str) -> torch.Tensor:
        ids = self.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    @torch.inference_mode()
    def read(self) -> hfkv.KVCache:
        """A cache of the document."""
        cache = self.model.hfkv.new_cache()
        self.model(self.document, past_key_values=cache, logits_to_keep=1)
        return cache

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The document with each question in a batch, and its mask; padding lies between the two."""
        longest = max(question.shape[1] for question in self.questions)
        rows, masks = [], []
        for question in self.questions:
            padding = question.new_full((1, longest - question.shape[1]), self.tokenizer.pad_token_id or 0)
            rows.append(torch.cat((self.document, padding, question), dim=1))
            masks.append(torch.cat([torch.full_like(self.document, 1), padding * 0, question * 0 + 1], dim=1))
        return torch.cat(rows), torch.cat(masks)

    def answer(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> tuple[list[str], Any]:
        """The answers to a batch of prompts, and the cache they are in: `cache`, or a new one for None."""
        output = self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=NUM_DIGITS - GIVEN,
            do_sample=False,
            return_dict_in_generate=True,
        )
        new = self.tokenizer.batch_decode(output.sequences[:, ids.shape[1] :], skip_special_tokens=True)
        return [answer[: NUM_DIGITS - GIVEN] for answer in new], output.past_key_values

    def one_by_one(self, shares: bool) -> Way:
        """One call for each question; all of their caches are kept."""
        way = Way(f"one by one, {'cache.fork() for each' if shares else 'each reads the document'}")
        caches, start = [], time.perf_counter()
        document = self.read() if shares else None
        for question in self.questions:
            prompt = torch.cat((self.document, question), dim=1)
            fork = document.fork() if document is not None else None
            answers, cache = self.answer(prompt, torch.ones_like(prompt), fork)
            way.answers += answers
            caches.append(cache)
        way.seconds = time.perf_counter() - start
        # Forks lie in the pages of the document's cache: each tells the bytes of all of them.
        way.nbytes = document.nbytes() if document is not None else sum(cache.nbytes() for cache in caches)
        way.tokens_read = self._tokens_read(shares)
        return way

    def all_at_once(self, shares: bool) -> Way:
        """One batch."""
        count = len(self.questions)
        way = Way(f"one batch, {f'cache.fork({count})' if shares else 'each row reads the document'}")
        start = time.perf_counter()
        ids, mask = self.prompts()
        way.answers, cache = self.answer(ids, mask, self.read().fork(count) if shares else None)
        way.seconds = time.perf_counter() - start
        way.nbytes, way.tokens_read = cache.nbytes(), self._tokens_read(shares)
        return way

    def _tokens_read(self, shares: bool) -> int:
        asked = sum(question.shape[1] for question in self.questions)
        return asked + self.document.shape[1] * (1 if shares else len(self.questions))


def main(
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hub.")] = tiny_lm.PATH,
    dtype: Annotated[str, typer.Option(help="In float32 no token changes; auto is as stored.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the numbers.")] = 0,
) -> None:
    """Ask in four ways and compare."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype), AutoTokenizer.from_pretrained(model)
    document, numbers = write_document(random.Random(seed))
    questions = [QUESTION + number[:GIVEN] for number in numbers]
    with hfkv.patch(loaded, "none+paged+page_size:64"):
        asker = Asker(loaded, tokenizer, document, questions)
        asker.read()  # warm up
        ways = [way(shares) for way in (asker.one_by_one, asker.all_at_once) for shares in (False, True)]
    table = Table("way", "s", "tokens read", "caches, bytes", "right", title=f"{len(questions)} questions")
    for way in ways:
        right = sum(answer == number[GIVEN:] for answer, number in zip(way.answers, numbers, strict=True))
        table.add_row(
            way.name, f"{way.seconds:.2f}", f"{way.tokens_read:,}", f"{way.nbytes:,}", f"{right} of {len(numbers)}"
        )
    console.print(table)
    for question, answer, number in zip(questions, ways[0].answers, numbers, strict=True):
        verdict = "right" if answer == number[GIVEN:] else f"should be {number[GIVEN:]}"
        console.print(Text.assemble(question.strip(), (answer, "bold"), f"  ({verdict})"))
    if any(way.answers != ways[0].answers for way in ways):
        console.print("The answers differ. Half precision rounds differently in shorter reads: compare in float32.")
        raise typer.Exit(1)
    console.print("The answers are the same in all four ways.")


if __name__ == "__main__":
    typer.run(main)
