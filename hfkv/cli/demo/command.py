"""``hfkv demo``: the bundled model under every cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskProgressColumn

from hfkv.cli.consoles import new_console
from hfkv.cli.demo.runs import DemoSetting, measure, num_steps
from hfkv.cli.demo.screen import show
from hfkv.cli.errors import told_in_one_line
from hfkv.cli.loading import load, loading_bars, pick_device, pick_dtype, progress_on
from hfkv.cli.outputs import check_outputs


def demo(
    prompt_bytes: Annotated[int, typer.Option(help="Length of the prompt.")] = DemoSetting.prompt_bytes,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate; one is a byte.")
    ] = DemoSetting.max_new_tokens,
    window: Annotated[int, typer.Option(help="Tokens a sliding window keeps.")] = DemoSetting.window,
    rounds: Annotated[int, typer.Option(help="Timed runs of each cache.")] = DemoSetting.rounds,
    loss_bytes: Annotated[int, typer.Option(help="Held-out text to measure the loss on.")] = DemoSetting.loss_bytes,
    dtype: Annotated[str, typer.Option(help="auto (as stored: bfloat16), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda …")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Show every cache at work on a small bundled model: bytes, speed, tokens and loss. No network.

    The model continues Python source code it was not trained on.
    """
    import torch

    from hfkv import tiny_lm

    with told_in_one_line():
        setting = DemoSetting(prompt_bytes, max_new_tokens, window, rounds, loss_bytes, loss_context=4 * window)
        check_outputs(json_path)
        chosen_dtype, chosen_device = pick_dtype(dtype), pick_device(device)
        # The model is too small for more threads to pay, and they stall each other where other work runs: a demo of
        # 45 s with one thread took 170 s with two beside one busy process on two cores.
        torch.set_num_threads(1)
        bars = new_console(stderr=True)
        with loading_bars(bars):
            model, tokenizer = load(None, chosen_dtype, chosen_device)
        with progress_on(bars, TaskProgressColumn()) as progress:
            task = progress.add_task("", total=num_steps(setting))
            report = measure(
                model,
                tokenizer,
                tiny_lm.held_out_text(),
                setting,
                lambda what: progress.update(task, advance=1, description=f"{what:<38}"),
            )
        show(report, new_console())
        if json_path is not None:
            report.write_json(json_path)
