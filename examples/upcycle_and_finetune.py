"""Upcycle the bundled model to a mixture of experts and train it, beside the dense model on the same batches.

    python examples/upcycle_and_finetune.py --picture loads.png

Prints the numbers of docs/use/upcycling.md. It needs no network: the bundled model, which knows the sources of Python's
standard library, learns those of torch.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hfkv
from hfkv import tiny_lm
from hfkv.eval import held_out_loss

BOS = 257
CONTEXT = 512
ROWS = 2
HELD_OUT_EVERY = 20  # of torch's source files, in sorted order


def torch_texts(num_blocks: int) -> tuple[list[bytes], bytes]:
    """torch's Python sources, which the bundled model has not seen.

    Returns:
        The files to train on, and so many blocks of `CONTEXT` bytes, evenly spaced over the held-out files.
    """
    root = Path(torch.__file__).parent
    files = [file for file in sorted(root.rglob("*.py")) if "testing" not in file.relative_to(root).parts]
    contents = [file.read_bytes().decode("ascii", "ignore").encode() for file in files]
    text = b"\n".join(contents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    pace = len(text) // num_blocks
    held_out = b"".join(text[i * pace : i * pace + CONTEXT] for i in range(num_blocks))
    return [content for i, content in enumerate(contents, start=1) if i % HELD_OUT_EVERY], held_out


class TextRows(torch.utils.data.Dataset):
    """Rows of BOS and `CONTEXT` bytes of a text; row i is the same in every run."""

    def __init__(self, texts: list[bytes], num_rows: int, seed: int):
        self.stream = torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)
        rng = random.Random(seed)
        self.starts = [rng.randrange(len(self.stream) - CONTEXT) for _ in range(num_rows)]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.stream[self.starts[i] : self.starts[i] + CONTEXT].long()
        ids = torch.cat((torch.tensor([BOS]), row))
        return {"input_ids": ids, "labels": ids}


class MoETrainer(Trainer):
    """transformers' Trainer, with the losses of SparseMoE layers added to the language model's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            # The Trainer divides the model's own loss by all tokens of a step, and would add ours up.
            loss = loss + hfkv.moe_losses(model).total / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Bar(TrainerCallback):
    """A progress bar with the training loss."""

    def __init__(self, name: str, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self.task = self.progress.add_task(name, note="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress.update(self.task, total=state.max_steps)
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.progress.update(self.task, note=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.stop()


def train(name, model, trainer_class, rows, steps, rate, console):
    """Trains for so many steps of `ROWS` rows; returns the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=min(20, steps // 4),
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=max(1, min(20, steps // 4)),
            seed=0,  # of the order of the rows too
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=True,
        )
        trainer = trainer_class(model, arguments, train_dataset=rows, callbacks=[Bar(name, console)])
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    model.eval()
    return seconds


def main(
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 300,
    dense_rate: Annotated[float, typer.Option(help="Learning rate of the dense model.")] = 1e-3,
    moe_rate: Annotated[float, typer.Option(help="Learning rate of the mixture.")] = 1e-3,
    experts: Annotated[int, typer.Option(help="Experts of each layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of each token.")] = 2,
    balance_coef: Annotated[float, typer.Option(help="Coefficient of the load balancing loss.")] = 0.01,
    held_out_blocks: Annotated[int, typer.Option(help=f"Blocks of {CONTEXT} held-out bytes to score.")] = 128,
    picture: Annotated[Path | None, typer.Option(help="PNG file for the load of the experts after training.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the routers and of which rows are drawn.")] = 0,
) -> None:
    """Train both models and compare them."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    screen, console = Console(stderr=True), Console(width=110)
    dense, tokenizer = tiny_lm.load(torch.float32)
    texts, held_out_text = torch_texts(held_out_blocks)
    held_out = tokenizer(held_out_text.decode(), add_special_tokens=False, return_tensors="pt", verbose=False)[
        "input_ids"
    ][0]
    rows = TextRows(texts, steps * ROWS, seed)

    moe = hfkv.upcycle(copy.deepcopy(dense), experts, top_k, balance_coef=balance_coef)
    for layer in moe.model.layers:
        # Under autocast on a CPU a loop over experts is faster than torch's grouped product, which stays in float32.
        layer.mlp.experts_implementation = "eager"

    nats, loads = {"before": held_out_loss(dense, held_out, CONTEXT).nats}, {}
    with hfkv.routing_stats(moe) as loads["before"]:
        nats["upcycled"] = held_out_loss(moe, held_out, CONTEXT).nats
    dense_seconds = train("dense", dense, Trainer, rows, steps, dense_rate, screen)
    nats["dense"] = held_out_loss(dense, held_out, CONTEXT).nats
    moe_seconds = train("mixture", moe, MoETrainer, rows, steps, moe_rate, screen)
    with hfkv.routing_stats(moe) as loads["after"]:
        nats["mixture"] = held_out_loss(moe, held_out, CONTEXT).nats

    table = Table("model", "parameters", "learning rate", "steps", "nats a byte", "against the start", "train s")
    for name, model, key, rate, seconds in (
        ("dense, as bundled", dense, "before", None, None),
        ("upcycled, untrained", moe, "upcycled", None, None),
        ("dense, trained on", dense, "dense", dense_rate, dense_seconds),
        ("upcycled, trained", moe, "mixture", moe_rate, moe_seconds),
    ):
        table.add_row(
            name,
            f"{model.num_parameters():,}",
            f"{rate:g}" if rate else "-",
            f"{steps}" if rate else "-",
            f"{nats[key]:.4f}",
            f"{nats[key] - nats['before']:+.4f}",
            f"{seconds:.0f}" if seconds else "-",
        )
    console.print(table)
    for when, stats in loads.items():
        console.print(f"\nHeld-out text, {when} training:")
        console.print(stats)
    if picture is not None:
        console.print(f"\nload of the experts: {loads['after'].plot(picture)}")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, hfkv {hfkv.__version__}"
    console.print(
        f"\n{len(held_out):,} held-out bytes in blocks of {CONTEXT}; {ROWS} x {CONTEXT} bytes a step, the same rows in "
        f"the same order for both; {threads} threads; {versions}"
    )


if __name__ == "__main__":
    typer.run(main)
