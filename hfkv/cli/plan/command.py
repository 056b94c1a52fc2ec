"""``hfkv plan``: what of a model and its cache fits in a memory, from the model's config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfkv.cli.consoles import new_console
from hfkv.cli.errors import CommandError, first_line, told_in_one_line
from hfkv.cli.loading import pick_dtype
from hfkv.cli.outputs import check_outputs

if TYPE_CHECKING:
    from hfkv.planning.plan import MemoryPlan

DEVICES = ("auto", "cuda", "cpu")


def plan(
    model: Annotated[str, typer.Argument(help="llama-8b, qwen3-30b-a3b, small, tiny, a folder, or a name on the Hub.")],
    memory: Annotated[
        str | None, typer.Option(help="Bytes for everything, such as 24GiB.", show_default="what is free here")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Tokens a row, prompt and reply, such as 128k (of 1,024).", show_default="the model's most"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows; beams count.")] = 1,
    reply: Annotated[
        int | None,
        typer.Option(help="Tokens of each row that are generated: a window's spare room.", show_default="the most"),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="A cache to plan; may be given again.",
            show_default="none, int8, fp8, int4, int8+window:4096, none+offload",
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="auto (the least lossy that fit), bf16 (or the dtype's name), int8 or int4.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str, typer.Option(help="auto (an accelerator with --memory, else this machine's), cuda or cpu.")
    ] = "auto",
    bandwidth: Annotated[
        str | None,
        typer.Option(help="Of the device's memory, such as 4.3TB/s.", show_default="measured, if it is here"),
    ] = None,
    bus: Annotated[
        str | None, typer.Option(help="To the device, such as 50GB/s.", show_default="measured on a GPU, or 50GB/s")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them as this PNG file.")] = None,
) -> None:
    """Say what fits: weights, keys and values, the longest context, the largest batch and the floor of a step.

    Of a model only its config is read, and of the shapes by name (llama-8b) not even that: no network is needed.
    """
    with told_in_one_line():
        check_outputs(json_path, plot)
        made = make_plan(model, memory, context, batch, reply, kv, weights, dtype, device, bandwidth, bus)
        from hfkv.cli.plan.screen import show

        show(made, new_console())
        if json_path is not None:
            json_path.write_text(json.dumps(made.as_json(), indent=1) + "\n", encoding="utf-8")
        if plot is not None:
            from hfkv.cli.plan.picture import write_plot

            write_plot(plot, made)


def make_plan(
    model: str,
    memory: str | None = None,
    context: str | None = None,
    batch: int = 1,
    reply: int | None = None,
    kv: list[str] | None = None,
    weights: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    bandwidth: str | None = None,
    bus: str | None = None,
) -> MemoryPlan:
    """The plan of what was said on the command line.

    Raises:
        CommandError: a word is wrong, or the model has no config that could be read.
    """
    from hfkv.planning.plan import memory_plan
    from hfkv.planning.tokens import read_tokens

    if device not in DEVICES:
        raise CommandError(f"--device {device!r} is unknown; allowed: {', '.join(DEVICES)}")
    try:
        return memory_plan(
            model,
            memory,
            None if context is None else read_tokens("--context", context),
            batch,
            reply=reply,
            kv=kv,
            weights=weights,
            dtype=pick_dtype(dtype),
            device=None if device == "auto" else device,
            bandwidth=bandwidth,
            bus=bus,
        )
    except (TypeError, ValueError) as error:
        raise CommandError(f"hfkv plan: {first_line(error)}") from error
