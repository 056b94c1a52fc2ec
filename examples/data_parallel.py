"""Many prompts over many processes: each holds the whole model and continues its share, one file comes out in order.

    python examples/data_parallel.py [PROMPTS] [--out FILE]
    torchrun --nproc-per-node 2 examples/data_parallel.py [PROMPTS] [--out FILE]

PROMPTS is a text file with a prompt a line, the same for every process; without it, the bundled model gets lines of
Python. On several machines the second command runs on each of them: see docs/reference/scale.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hfkv
from hfkv import tiny_lm

NUM_PROMPTS = 24  # of the built-in ones


def check(kv: str, out: Path | None) -> None:
    """Refuses in one line what would fail after the model is loaded."""
    try:
        hfkv.KVConfig.parse(kv)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"--kv: {error}") from error
    if out is None:
        return
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}")
    if out.is_dir():
        raise typer.BadParameter(f"--out {str(out)!r} is a folder; name a file in it")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise typer.BadParameter(f"--out {str(out)!r} may not be written to")


def read_prompts(file: Path | None) -> list[str]:
    """The lines of a file that are not empty, or some of the bundled text's."""
    if file is not None:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"the prompts in {str(file)!r} could not be read: {error}") from error
        if not lines:
            raise typer.BadParameter(f"there is no prompt in {str(file)!r}: give a prompt a line")
        return lines
    starts = [line for line in tiny_lm.held_out_text().splitlines() if line.startswith(("def ", "class ", "import "))]
    return starts[:NUM_PROMPTS]


def load(name: str, dtype: str, kv: str, state: PartialState) -> tuple[Any, Any]:
    """The patched model, whole, on this process's device, and its tokenizer."""
    # One process of a machine downloads it, the others find it there.
    with state.local_main_process_first():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    hfkv.patch(model.to(state.device).eval(), kv=kv)
    return model, tokenizer


def continue_all(
    model: Any, tokenizer: Any, prompts: list[str], new_tokens: int, batch_size: int, is_shown: bool
) -> list[str]:
    """What the model writes behind each prompt, with a bar where it is shown."""
    texts: list[str] = []
    with tqdm(total=len(prompts), desc="prompts of this process", disable=not is_shown) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = tokenizer(prompts[first : first + batch_size], return_tensors="pt", padding=True).to(model.device)
            read = batch["input_ids"].shape[1]
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            output = model.generate(
                **given, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            texts += tokenizer.batch_decode(output[:, read:], skip_special_tokens=True)
            bar.update(len(batch["input_ids"]))
    return texts


def main(
    prompts: Annotated[Path | None, typer.Argument(help="A text file, a prompt a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON line for each prompt; without it they are printed.")] = None,
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hub.")] = tiny_lm.PATH,
    kv: Annotated[str, typer.Option(help="The cache: none, int8, int8+window:4096, ...")] = "int8",
    dtype: Annotated[str, typer.Option(help="In float32 no text depends on the batch; auto is as stored.")] = "float32",
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that a process continues at a time.")] = 4,
) -> None:
    """Share the prompts, continue them, and write all texts in their order."""
    check(kv, out)
    given = read_prompts(prompts)
    # Without an accelerator the processes are joined only where that is said.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not state.is_main_process:
        logging.disable_progress_bar()
    loaded, tokenizer = load(model, dtype, kv, state)
    start = time.perf_counter()
    with state.split_between_processes(given) as share:
        # Each process's part of the list is one piece of it, so that the parts one after the other are in order.
        texts = gather_object(continue_all(loaded, tokenizer, share, new_tokens, batch_size, state.is_main_process))
    seconds = time.perf_counter() - start
    if state.is_main_process:
        lines = [json.dumps({"prompt": prompt, "text": text}) for prompt, text in zip(given, texts, strict=True)]
        if out is None:
            print(*lines, sep="\n")
        else:
            out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        said = f"prompts: {len(given)}, processes: {state.num_processes}, {loaded.hfkv!r}: {seconds:.1f} s"
        Console(stderr=True, soft_wrap=True).print(said)
    # A thread of gloo still lets go of the gathered tensors, for which it needs the interpreter: one that is ending by
    # then aborts the process (torch 2.13).
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
