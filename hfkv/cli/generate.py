"""``hfkv generate``: text from a model with an hfkv cache, streamed to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.text import Text

from hfkv.cli.consoles import new_console
from hfkv.cli.errors import CommandError, first_line, told_in_one_line
from hfkv.cli.loading import load, loading_bars, pick_device, pick_dtype, progress_on
from hfkv.cli.stream import TokenClock
from hfkv.policy.units import MOST_COUNT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longer prompts go in by so many tokens at a time, so that the bar moves; shorter ones in one forward.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Generation:
    """What a run of `stream` cost.

    Attributes:
        kv: The policies of the cache, as a string.
        prompt_tokens: Tokens of the prompt, special ones included.
        new_tokens: Tokens generated.
        prefill_seconds: From the prompt to the first new token.
        tokens_per_second: Of the new tokens after the first; None where there is none.
        kv_bytes: Bytes the cache had allocated at the end.
    """

    kv: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    tokens_per_second: float | None
    kv_bytes: int

    def __str__(self) -> str:
        rate = "-" if self.tokens_per_second is None else f"{self.tokens_per_second:,.1f}"
        return (
            f"{self.prompt_tokens:,} prompt tokens in {self.prefill_seconds:.2f} s · {self.new_tokens:,} new tokens, "
            f"{rate} tokens/s · KV {self.kv_bytes:,} bytes ({self.kv})"
        )


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    kv: str,
    max_new_tokens: int,
    console: Console | None = None,
    moe: str | None = None,
) -> Generation:
    """Prints a model's greedy continuation of a prompt to stdout as it comes, and a newline.

    Args:
        model: a causal language model or a `PeftModel`, unpatched; it is left as it was.
        tokenizer: its tokenizer.
        prompt: the text to continue; not empty.
        kv: the cache's policies, such as ``"int8+window:1024"``.
        max_new_tokens: number of new tokens, at least 1.
        console: where the prefill's progress bar goes; None for stderr.
        moe: how the model's experts are kept, such as ``"int8"``; None leaves them alone.

    Raises:
        CommandError: the prompt is empty, `kv` or the model is refused, or there is not enough memory.
    """
    import torch
    from transformers import TextStreamer

    from hfkv.patches.patch import patch
    from hfkv.policy.config import KVConfig

    if not prompt.strip():
        raise CommandError("the prompt is empty; give a text, or - to read it from stdin")
    if max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if max_new_tokens > MOST_COUNT:
        raise CommandError(f"--max-new-tokens must be at most {MOST_COUNT:,}, got {max_new_tokens}")
    # verbose: generate itself warns of a text longer than the model was made for.
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False).to(model.device)
    num_prompt = inputs["input_ids"].shape[1]
    try:
        handle = patch(model, kv, moe=moe)
    except (TypeError, ValueError, NotImplementedError) as error:
        asked = f"--kv {kv!r}" if moe is None else f"--kv {kv!r} --moe {moe!r}"
        raise CommandError(f"{asked} on {type(model).__name__}: {error}") from error
    with handle, _prefill_bar(handle.model, num_prompt, console or new_console(stderr=True)) as end_bar:
        clock = TokenClock(end_bar, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        try:
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                # Said outright: the generation config saved with a model may ask for something else.
                do_sample=False,
                num_beams=1,
                use_cache=True,
                cache_implementation="dynamic",
                streamer=clock,
                prefill_chunk_size=PREFILL_CHUNK if num_prompt > PREFILL_CHUNK else None,
                return_dict_in_generate=True,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise CommandError(
                f"out of memory: {first_line(error)} Take a smaller --kv (int8, window:SIZE, offload) "
                "or a shorter text."
            ) from error
    return Generation(
        kv=str(KVConfig.of(kv)),
        prompt_tokens=num_prompt,
        new_tokens=clock.num_tokens,
        prefill_seconds=clock.prefill_seconds,
        tokens_per_second=clock.tokens_per_second,
        kv_bytes=output.past_key_values.nbytes(),
    )


@contextmanager
def _prefill_bar(model: Any, num_prompt: int, console: Console) -> Iterator[Any]:
    """Draws how much of the prompt the model has read; yields the function that ends the bar."""
    with progress_on(console, MofNCompleteColumn()) as progress:
        task = progress.add_task("reading the prompt", total=num_prompt)

        def advance(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            cache = kwargs.get("past_key_values")
            if cache is not None and not progress.finished:
                progress.update(task, completed=min(cache.get_seq_length(), num_prompt))

        hook = model.register_forward_hook(advance, with_kwargs=True)
        try:
            yield progress.stop
        finally:
            hook.remove()


def _read_prompt(prompt: str) -> str:
    """The prompt itself, or what stdin holds where it is ``-``.

    Raises:
        CommandError: it is not UTF-8.
    """
    # Python hides bytes it cannot decode in lone surrogates.
    text = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"the prompt is not UTF-8 (byte {error.start}: {error.reason}); convert it first") from error


def check_kv(kv: str, moe: str | None = None) -> None:
    """Refuses a `kv` or a `moe` that does not parse, before a model is loaded for it.

    Raises:
        CommandError: naming the word.
    """
    from hfkv.experts.config import MoEConfig
    from hfkv.policy.config import KVConfig

    for option, parse, given in (("--kv", KVConfig.parse, kv), ("--moe", MoEConfig.parse, moe)):
        if given is None:
            continue
        try:
            parse(given)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{option} {error}") from error


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin, as it is.")],
    model: Annotated[
        str | None, typer.Option(help="A folder, or a name on the Hub.", show_default="the bundled model")
    ] = None,
    kv: Annotated[str, typer.Option(help="The cache, such as int8+window:1024+offload+paged.")] = "none",
    moe: Annotated[
        str | None, typer.Option(help="The experts of a sparse model: auto, int8 or int4.", show_default="as they are")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    lora: Annotated[str | None, typer.Option(help="A PEFT adapter for the model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda, cuda:1 …")] = "auto",
) -> None:
    """Continue a text, greedily, with an hfkv cache.

    The text goes to stdout and nothing else does; bars, the closing figures and errors go to stderr.
    """
    with told_in_one_line():
        check_kv(kv, moe)
        text = _read_prompt(prompt)
        if not text.strip():
            raise CommandError("the prompt is empty; give a text, or - to read it from stdin")
        chosen_dtype, chosen_device = pick_dtype(dtype), pick_device(device)
        console = new_console(stderr=True)
        with loading_bars(console):
            loaded, tokenizer = load(model, chosen_dtype, chosen_device, lora)
        generation = stream(loaded, tokenizer, text, kv, max_new_tokens, console, moe)
        console.print(Text(str(generation), style="dim"), soft_wrap=True)
