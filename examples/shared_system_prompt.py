"""One long system prompt and many questions: with reuse, only the first call reads the system prompt.

    python examples/shared_system_prompt.py [--model PATH]

Plain `model.generate`, one question after the other, first without reuse and then with it. A table shows for each
question how many tokens of its prompt were found and how many were read, and the time to the first new token both ways.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import hfkv
from hfkv import tiny_lm

SYSTEM_BYTES = 1500
QUESTIONS = (
    "What does insort_right do?",
    "Where do equal items go?",
    "What are lo and hi for?",
    "Write a test of bisect_left.",
    "Does it work with a key?",
)
console = Console()


class FirstToken(BaseStreamer):
    """Notes when the first new token came."""

    def __init__(self) -> None:
        self.puts: list[float] = []  # the prompt, then token by token

    def put(self, tokens: torch.Tensor) -> None:
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Answer:
    """To one question."""

    text: list[int]
    seconds: float  # to the first new token
    tokens_found: int


def encode(tokenizer: Any, question: str) -> Any:
    """The system prompt and a question, in the model's chat template where it has one."""
    system = "Answer questions about this code:\n" + tiny_lm.held_out_text()[:SYSTEM_BYTES]
    if tokenizer.chat_template is None:
        return tokenizer(f"{system}\n\n{question}\n", return_tensors="pt")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def ask(model: Any, prompts: list[Any], new_tokens: int) -> list[Answer]:
    """Answers the prompts one after the other, as any program would."""
    answers = []
    for prompt in prompts:
        found = model.hfkv.reuse_stats().tokens_reused if model.hfkv.kv.reuse else 0
        clock, start = FirstToken(), time.perf_counter()
        text = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False, streamer=clock)
        if model.hfkv.kv.reuse:
            found = model.hfkv.reuse_stats().tokens_reused - found
        answers.append(Answer(text[0].tolist(), clock.puts[1] - start, found))
    return answers


def main(
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hub.")] = tiny_lm.PATH,
    dtype: Annotated[str, typer.Option(help="In float32 no token changes; auto is as stored.")] = "float32",
    budget: Annotated[str, typer.Option(help="The most bytes to keep between calls.")] = "512MiB",
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 24,
) -> None:
    """Ask, and show what was read and how long it took."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype), AutoTokenizer.from_pretrained(model)
    prompts = [encode(tokenizer, question).to(loaded.device) for question in QUESTIONS]
    with hfkv.patch(loaded, "none"):
        ask(loaded, prompts[:1], 2)  # warm up
        without = ask(loaded, prompts, new_tokens)
    with hfkv.patch(loaded, hfkv.KVConfig(reuse=hfkv.Reuse(budget=budget))) as patch:  # or "none+reuse:512MiB"
        shared = ask(loaded, prompts, new_tokens)
        stats = patch.reuse_stats()
    asked = Column("question", no_wrap=True)
    table = Table(asked, "tokens found", "tokens read", "first token, ms", "without reuse, ms", "same text")
    for question, prompt, one, other in zip(QUESTIONS, prompts, shared, without, strict=True):
        table.add_row(
            question,
            f"{one.tokens_found:,}",
            f"{prompt['input_ids'].shape[1] - one.tokens_found:,}",
            f"{one.seconds * 1e3:.1f}",
            f"{other.seconds * 1e3:.1f}",
            "yes" if one.text == other.text else "NO",
        )
    console.print(table)
    console.print(
        f"reuse_stats: {stats.hits} of {stats.lookups} prompts began like an earlier one; {stats.tokens_reused:,} of "
        f"{stats.tokens:,} tokens were not read again; {stats.pages} pages of {stats.page_size} tokens kept, "
        f"{stats.nbytes:,} of at most {stats.budget:,} bytes; {stats.evictions} pages had to go"
    )
    if [answer.text for answer in shared] != [answer.text for answer in without]:
        console.print("The texts differ. Half precision rounds differently in shorter reads: compare in float32.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
