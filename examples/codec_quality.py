"""What each cache costs the bundled model: held-out loss, top-1 agreement, pass keys and bytes.

    python examples/codec_quality.py [--dtype bfloat16] [--num-bytes 168758] [--trials 100] [--kv int4 --kv int3]

Prints the table of docs/understand/tiny-lm.md.
"""

import copy
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hfkv
from hfkv import tiny_lm
from hfkv.eval import held_out_loss, pass_key_accuracy, top1_agreement

CONFIGS = (
    *("none", "int8", "fp8", "int4", "int3", "int2", "int8+paged+offload"),
    *("window:256", "int8+window:256", "int4+window:256"),
)
CONTEXT = 512


def held_of_bf16(model, ids, kv):
    """Bytes held after CONTEXT tokens and one more, against those of a full cache in bf16."""
    twin = copy.deepcopy(model).to(torch.bfloat16)
    twin.set_attn_implementation("hfkv")
    caches = [hfkv.KVCache(twin, kv), hfkv.KVCache(twin)]
    with torch.inference_mode():
        for cache in caches:
            twin(ids[None, :CONTEXT], past_key_values=cache)
            twin(ids[None, :1], past_key_values=cache)
    return caches[0].held_bytes() / caches[1].held_bytes()


def main(
    dtype: Annotated[str, typer.Option(help="Arithmetic: float32 or bfloat16.")] = "float32",
    num_bytes: Annotated[int, typer.Option(help="Bytes of held-out text.")] = 168_758,
    trials: Annotated[int, typer.Option(help="Pass keys of 512 bytes.")] = 100,
    kv: Annotated[list[str], typer.Option(help="Configs to measure.")] = list(CONFIGS),  # noqa: B006
) -> None:
    """Measures every config against a forward without any cache."""
    model, tokenizer = tiny_lm.load(getattr(torch, dtype))
    text = tiny_lm.held_out_text()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0][:num_bytes]
    full = held_out_loss(model, ids, CONTEXT)
    table = Table("kv", "nats a byte", "change", "same top-1", "pass keys", "held, of bf16")
    table.add_row("no cache", f"{full.nats:.4f}", "", "", "", "")
    for config in track(kv, "measuring", console=Console(stderr=True)):
        with hfkv.patch(model, config) as handle:  # which finds the mean of keys that few bits are written less
            lossy = held_out_loss(model, ids, CONTEXT, make_cache=handle.new_cache)
            found = pass_key_accuracy(model, tokenizer, text, CONTEXT, trials, make_cache=handle.new_cache)
        change, same = lossy.nats / full.nats - 1, top1_agreement(lossy, full)
        table.add_row(
            config,
            f"{lossy.nats:.4f}",
            f"{change:+.3%}",
            f"{same:.2%}",
            f"{found:.0%}",
            f"{held_of_bf16(model, ids, config):.3f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{len(ids):,} bytes in blocks of {CONTEXT}, {trials} pass keys of {CONTEXT} bytes, {dtype}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, hfkv {hfkv.__version__}"
    )


if __name__ == "__main__":
    typer.run(main)
