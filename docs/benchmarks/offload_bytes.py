"""Counts what an offloaded cache sends over the bus at each decode step, on a machine without an accelerator.

The CPU is treated as a device whose memory is not the host's: every page that would travel is copied, and counted.
Times mean nothing here.

    python docs/benchmarks/offload_bytes.py --context 8192 --steps 128
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import hfkv
from hfkv.measure.machine import describe_machine
from hfkv.stores.offload import bus

CONFIGS = (
    "none+offload",
    "int8+offload",
    "int4+offload",
    "int8+offload+device_budget:8MiB",
    "int8+offload+device_budget:64MiB",
    "int8+window:2048+offload",
    "int8+window:2048+offload+device_budget:8MiB",
)
LAYERS, PAGE_SIZE = 4, 64


def main(
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 8192,
    steps: Annotated[int, typer.Option(help="Decode steps that are counted.")] = 128,
) -> None:
    """Prints a table of bytes."""
    bus.BUSES["cpu"] = bus.Bus
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(3, 131, (1, context))
    table = Table("kv", "held, MiB", "on the device", "in host memory", "to the host, kB", "to the device, MiB")
    for words in track(CONFIGS, "counting"):
        kv = f"{words}+paged+page_size:{PAGE_SIZE}"
        with hfkv.patch(model, kv), torch.no_grad():
            cache = hfkv.KVCache(model, kv)
            cache.reserve(context + steps + 2)
            model(ids, past_key_values=cache, logits_to_keep=1)
            model(ids[:, :1], past_key_values=cache)
            way = bus.bus_to(cpu)
            before = way.bytes_to_host, way.bytes_to_device
            for _ in range(steps):
                model(ids[:, :1], past_key_values=cache)
            moved = way.bytes_to_host - before[0], way.bytes_to_device - before[1]
            on_device = sum(
                plane.held for leaf in cache.leaves for plane in leaf.store.memory()[::2]
            )  # device and host take turns
            table.add_row(
                words,
                f"{cache.held_bytes() / 2**20:.1f}",
                f"{on_device / 2**20:.2f}",
                f"{(cache.held_bytes() - on_device) / 2**20:.2f}",
                f"{moved[0] / steps / 1e3:.2f}",
                f"{moved[1] / steps / 2**20:.2f}",
            )
    said = describe_machine(cpu)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"1 × {context:,} tokens, {LAYERS} layers of 8 kv heads of 128, bf16, pages of {PAGE_SIZE}; the mean of "
        f"{steps} steps. hfkv {said['hfkv']}, torch {said['torch']}, transformers {said['transformers']}, "
        f"{said['processor']}"
    )


if __name__ == "__main__":
    typer.run(main)
