"""Endless text in constant memory and constant time: tens of thousands of tokens from a window of a few hundred.

    python examples/endless_text.py

The bundled model continues a prompt far beyond the 2,176 tokens it was trained on. A table shows, as the text grows,
the bytes of the cache and the median time of a step.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

import hfkv
from hfkv import tiny_lm

console = Console()


class Watch(BaseStreamer):
    """Notes when each token came and how many bytes the cache had."""

    def __init__(self, progress: Progress, new_tokens: int) -> None:
        self.times: list[float] = []
        self.nbytes: list[int] = []
        self.cache: Any = None
        self._progress, self._task = progress, progress.add_task("generating", total=new_tokens)

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.nbytes.append(self.cache.nbytes())
        if len(self.times) % 100 == 0:
            self._progress.update(self._task, completed=len(self.times))

    def end(self) -> None:
        self._progress.update(self._task, completed=len(self.times))

    def step_ms(self, first: int, last: int) -> float:
        """Median milliseconds of the steps `first .. last - 1`."""
        steps = [b - a for a, b in zip(self.times[first:last], self.times[first + 1 : last + 1], strict=False)]
        return 1000 * statistics.median(steps)


def main(
    kv: Annotated[str, typer.Option(help="The cache.")] = "window:512+sinks:4+sink_positions:cache",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 50_000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Generate and show what it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, tokenizer = tiny_lm.load()
    model.generation_config.eos_token_id = None
    inputs = tokenizer(tiny_lm.held_out_text()[:256], return_tensors="pt")
    with (
        hfkv.patch(model, kv) as patch,
        Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        watch = Watch(progress, new_tokens)
        watch.cache = cache = hfkv.KVCache(model, kv, patch.rotary)
        text = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=new_tokens, do_sample=True, streamer=watch
        )
    marks = [mark for mark in (1000, 2000, 5000, 10_000, 20_000, 30_000, 40_000, 50_000) if mark <= new_tokens]
    table = Table("tokens", "cache, bytes", "median step, ms (last 1,000)", title=kv)
    rows = [(mark, watch.nbytes[mark - 1], watch.step_ms(mark - 1000, mark)) for mark in marks]
    for mark, nbytes, milliseconds in rows:
        table.add_row(f"{mark:,}", f"{nbytes:,}", f"{milliseconds:.3f}")
    console.print(table)
    console.print("The text ends:", repr(tokenizer.decode(text[0, -160:])), markup=False)
    if output is not None:
        figures = {
            "kv": kv,
            "new_tokens": new_tokens,
            "torch": torch.__version__,
            "hfkv": hfkv.__version__,
            "rows": [dict(zip(("tokens", "nbytes", "step_ms"), row, strict=True)) for row in rows],
            "bytes_seen_after_2000": sorted(set(watch.nbytes[2000:])),
        }
        output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
