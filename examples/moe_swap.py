"""One MoE model, its experts run and kept in five ways: time, bytes, and what the text loses.

    python examples/moe_swap.py [--model PATH] [--new-tokens N] [--plot FILE.png]

Without ``--model`` the bundled model is upcycled to a Mixtral of 8 experts with a little noise between them: so they
differ. The same text is continued with transformers' own experts and with hfkv's: as they are, in int8 and in int4, and
with a LoRA adapter on every expert. The router is the model's own in all of them. The loss is that of held-out text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfkv
from hfkv import tiny_lm
from hfkv.policy.units import about_bytes

NUM_EXPERTS, NOISE = 8, 0.02
HELD_OUT = 2048  # bytes of text that the loss is measured on
PROMPT = 256
console = Console()


@dataclass(frozen=True)
class Way:
    """Of keeping and running experts: transformers' implementation, or what hfkv is asked for."""

    name: str
    implementation: str | None = None
    moe: str | None = None
    has_adapter: bool = False


WAYS = (
    Way("transformers eager", implementation="eager"),
    Way("transformers grouped_mm", implementation="grouped_mm"),
    Way("hfkv auto", moe="auto"),
    Way("hfkv auto + LoRA", moe="auto", has_adapter=True),
    Way("hfkv int8", moe="int8"),
    Way("hfkv int4", moe="int4"),
)


@dataclass(frozen=True)
class Figures:
    """What came of one way."""

    expert_bytes: int
    prefill_seconds: float
    step_seconds: float
    loss: float
    text: str


def load(path: str | None) -> tuple[Any, Any]:
    """A model with experts and its tokenizer, in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(path or tiny_lm.PATH)
    torch.manual_seed(0)
    if path is not None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    else:
        dense = AutoModelForCausalLM.from_pretrained(tiny_lm.PATH, dtype=torch.float32)
        model = hfkv.upcycle(dense, NUM_EXPERTS, to="mixtral", noise=NOISE).to(torch.bfloat16)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def adapt(model: Any) -> Any:
    """A `PeftModel` with LoRA on every expert, that changes nothing yet."""
    from peft import LoraConfig, get_peft_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=8, target_modules=[], target_parameters=targets)).eval()


def stock_bytes(model: Any) -> int:
    """Bytes of the weights of all experts."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, expert_bytes: int, new_tokens: int) -> Figures:
    """Continues a text and reads another."""
    text = tiny_lm.held_out_text()
    ids = tokenizer(text[:HELD_OUT], return_tensors="pt").input_ids.to(model.device)
    prompt, held_out = ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 1024]
    mask = torch.ones_like(prompt)
    asked = {"attention_mask": mask, "do_sample": False, "min_new_tokens": 1, "eos_token_id": None}
    model.generate(prompt, max_new_tokens=2, **asked)  # what is done only once
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=1, **asked)
    prefill = time.perf_counter() - began
    began = time.perf_counter()
    output = model.generate(prompt, max_new_tokens=new_tokens, **asked)
    step = (time.perf_counter() - began - prefill) / (new_tokens - 1)
    loss = model(held_out, labels=held_out).loss.item()
    return Figures(expert_bytes, prefill, step, loss, tokenizer.decode(output[0, PROMPT:]))


def run(way: Way, path: str | None, new_tokens: int) -> Figures:
    """One way, on a model of its own."""
    model, tokenizer = load(path)
    if way.moe is None:
        model.set_experts_implementation(way.implementation)
        return measure(model, tokenizer, stock_bytes(model), new_tokens)
    if way.has_adapter:
        model = adapt(model)
    handle = hfkv.patch(model, moe=way.moe)
    assert handle.moe is not None
    return measure(model, tokenizer, handle.moe.bytes_after, new_tokens)


def draw(figures: dict[str, Figures], path: Path) -> None:
    """A chart of bytes and time, way by way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
    names = list(figures)
    axes[0].barh(names, [f.expert_bytes / 2**20 for f in figures.values()])
    axes[0].set(xlabel="experts, MiB")
    axes[1].barh(names, [f.step_seconds * 1000 for f in figures.values()])
    axes[1].set(xlabel="one new token, ms")
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=150)
    console.print(f"chart in {path}")


def main(
    model: Annotated[str | None, typer.Option(help="A folder or a name on the Hub with a MoE model.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    plot: Annotated[Path | None, typer.Option(help="Where a PNG chart goes.")] = None,
) -> None:
    """Runs every way and shows them side by side."""
    figures = {way.name: run(way, model, new_tokens) for way in track(WAYS, "ways", console=console, transient=True)}
    table = Table(title="experts, side by side")
    for column in ("experts", "bytes", "prefill, ms", "a token, ms", "loss", "same text as eager"):
        table.add_column(column, justify="left" if column == "experts" else "right", no_wrap=column == "experts")
    first = next(iter(figures.values()))
    for name, f in figures.items():
        same = "yes" if f.text == first.text else "no"
        times = f"{f.prefill_seconds * 1000:,.1f}", f"{f.step_seconds * 1000:.2f}"
        table.add_row(name, about_bytes(f.expert_bytes), *times, f"{f.loss:.4f}", same)
    console.print(table)
    if plot is not None:
        draw(figures, plot)


if __name__ == "__main__":
    typer.run(main)
