"""A conversation that goes on in another process: the cache in a file is all there is to keep.

    python examples/chat_that_survives.py "first line"
    python examples/chat_that_survives.py "second line"
    python examples/chat_that_survives.py --forget "another first line"

The second run loads what the first has left in chat.safetensors and reads only the new line; the turns so far are
printed from the tokens that the cache holds. A file that is damaged, or of another model, is refused in one line.
Loading pays where there is much to read: say "$(head -c 1500 README.md)" first.
(The bundled model has seen no chat: its replies only look like text.)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfkv
from hfkv import tiny_lm

MARK = "<<reply>>"
console = Console(highlight=False)


def turn(tokenizer: Any, line: str, held: torch.Tensor) -> torch.Tensor:
    """The user's line in the model's chat template: what to read behind the tokens held, `[1, T]`.

    It is cut out of a small conversation, so that the text held is never made and tokenised again: what comes out of a
    template or a tokenizer a second time need not be what went in.
    """
    messages = [{"role": "user", "content": line}]
    if held.shape[1]:
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}, *messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text = text.partition(MARK)[2] if held.shape[1] else text
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    # A reply that came to its end has told so already.
    is_told = held.shape[1] and held[0, -1] == ids[0, 0] and ids[0, 0] in tokenizer.all_special_ids
    return ids[:, 1:] if is_told else ids


@torch.inference_mode()
def reply(model: Any, tokenizer: Any, cache: hfkv.KVCache, line: str, new_tokens: int) -> tuple[torch.Tensor, int]:
    """Answers a line. The cache then holds all of the conversation.

    Returns:
        The tokens of the conversation, `[1, T]`, and how many of them the reply has.
    """
    held = cache.holds_tokens if cache.get_seq_length() else torch.empty(1, 0, dtype=torch.long)
    if held is None:
        raise ValueError("the file does not say which tokens it holds, so nothing can be put behind them")
    prompt = torch.cat((held, turn(tokenizer, line, held)), dim=1).to(model.device)
    # The whole text goes in; what the cache holds of it is compared, and not read again.
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    # `generate` never reads the last token it makes. Read it, so that the cache holds the text to its end.
    model(text[:, cache.get_seq_length() :], past_key_values=cache)
    return text, text.shape[1] - prompt.shape[1]


@torch.inference_mode()
def seconds_to_read(model: Any, tokens: torch.Tensor) -> float:
    """How long it takes to read tokens anew."""
    start = time.perf_counter()
    model(tokens.to(model.device), past_key_values=model.hfkv.new_cache(), logits_to_keep=1)
    return time.perf_counter() - start


def main(
    line: Annotated[str, typer.Argument(help="What you say next.")],
    file: Annotated[Path, typer.Option(help="Keeps the conversation.")] = Path("chat.safetensors"),
    forget: Annotated[bool, typer.Option("--forget", help="Start anew.")] = False,
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hub, of a chat model.")] = tiny_lm.PATH,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is as stored.")] = "float32",
    new_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 48,
) -> None:
    """Say a line and keep the conversation."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype), AutoTokenizer.from_pretrained(model)
    try:
        with hfkv.patch(loaded) as patch:
            cache, start = patch.new_cache(), time.perf_counter()
            if file.exists() and not forget:
                cache = hfkv.KVCache.load(file, loaded)
            load_seconds, num_loaded = time.perf_counter() - start, cache.get_seq_length()
            text, num_new = reply(loaded, tokenizer, cache, line, new_tokens)
            cache.save(file)
            anew = seconds_to_read(loaded, text[:, :num_loaded]) if num_loaded else 0
    except (ValueError, OSError) as error:
        hint = ", or start anew with --forget" if isinstance(error, ValueError) else ""
        message = f"error: {' '.join(str(error).split())}{hint}"
        Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(tokenizer.decode(text[0], skip_special_tokens=True), markup=False, soft_wrap=True)
    console.rule()
    if num_loaded:
        console.print(
            f"loaded {num_loaded:,} tokens in {load_seconds * 1e3:.1f} ms; to read them anew takes {anew * 1e3:.1f} ms"
        )
    console.print(
        f"read {text.shape[1] - num_loaded - num_new:,} tokens, wrote {num_new:,}; {file} holds all {text.shape[1]:,}, "
        f"{file.stat().st_size:,} bytes",
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
