"""``hfkv bench``: what caches and experts cost in time and memory, side by side, each beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import TaskProgressColumn

from hfkv.cli.bench_screen import show, show_verdicts
from hfkv.cli.bench_words import Words, setting_of
from hfkv.cli.errors import CommandError, told_in_one_line
from hfkv.cli.loading import progress_on
from hfkv.cli.outputs import check_outputs
from hfkv.cli.said import command_line
from hfkv.policy.errors import RequestError

if TYPE_CHECKING:
    from hfkv.bench import Result, Setting, Verdict
    from hfkv.bench.checks import Target

# What is wrong with a result, where nothing was wrong with the command.
EXIT_CODE = 1


def bench(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Argument(help="attention, step, memory, prefill, reuse, moe or mla.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="llama-8b, qwen3-30b-a3b, small or tiny; in moe: moe-small, qwen3-30b-a3b, mixtral-8x7b or moe-tiny; "
            "in mla: deepseek-v2-lite, deepseek-v3 or mla-tiny.",
            show_default="llama-8b; on a CPU whole models: small, moe: moe-small, mla: deepseek-v2-lite",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The shape of a model: a folder, or a name on the Hub.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers to build, or to take turns over.")] = None,
    contexts: Annotated[
        str | None, typer.Option("--context", help="Tokens, such as 512,16384.", show_default="by suite and shape")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows.", show_default="1")] = None,
    ragged: Annotated[str | None, typer.Option(help="prefill: real tokens of each left-padded row, 8192,4096.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda …")] = "auto",
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="A cache of hfkv's; may be given again. In step with +graphs behind it: from CUDA graphs.",
            show_default="none, int8, int4, fp8, paged, int8+paged, window:1024; mla: none, int8, int4, paged",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="moe: tokens of a call. mla: tokens held; in its part prefill, without --queries, of a prompt.",
            show_default="moe: 1,8,128,1024; on a GPU 1,32,128,4096; mla: by part",
        ),
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="mla: decode, step, prefill, crossover.", show_default="all of them")
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="mla: new tokens at once in crossover, and in prefill behind those held.", show_default="by part"
        ),
    ] = None,
    moe: Annotated[
        list[str] | None,
        typer.Option(
            help="moe: how hfkv keeps the experts; may be given again. With +lora behind it: under adapters.",
            show_default="auto, int8, int4, auto+lora",
        ),
    ] = None,
    peers: Annotated[str, typer.Option(help="all, or names with commas; see docs/reference/bench.md.")] = "all",
    steps: Annotated[
        int | None, typer.Option(help="Timed steps of each.", show_default="as many as fit in --seconds")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="How long all take turns at a context, at least.", show_default="10; moe, mla: 4"),
    ] = None,
    busy: Annotated[int, typer.Option(help="Other processes that spin meanwhile, to see what a shared CPU does.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random weights, keys, values and tokens.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them as this PNG file.")] = None,
    check: Annotated[Path | None, typer.Option(help="Hold them against the ratios of this TOML file.")] = None,
    earlier: Annotated[
        list[Path] | None, typer.Option("--from", help="Show and check this file of --json; may be given again.")
    ] = None,
) -> None:
    """Time caches, or experts, side by side in one run: hfkv's and transformers' own, each beside its floor.

    attention: one layer's update and attention of a decode step.
    step: a whole decode step of generate().
    memory: bytes held, allocated, and needed during a step.
    prefill: a prompt to its first new token.
    reuse: a prompt whose beginning an earlier call has read, to its first new token.
    moe: one call of a layer's experts.
    mla: latent attention (DeepSeek), by parts: decode and prefill of one layer, step of four, crossover of its forms.

    Random weights of real shapes; nothing is downloaded.
    """
    with told_in_one_line():
        check_outputs(json_path, plot)
        targets = _targets(check)
        if earlier:
            _refuse_beside_from(context)
            results = _read(earlier)
        else:
            words = Words(
                suite,
                shape,
                model,
                layers,
                contexts,
                batch,
                ragged,
                dtype,
                device,
                kv,
                peers,
                steps,
                seconds,
                tokens,
                moe,
                part,
                queries,
                busy,
            )
            results = [_measure(setting_of(words, seed), command_line(context, "hfkv", "bench"))]
        console = Console(highlight=False)
        for result in results:
            show(result, console)
        if json_path is not None:
            results[0].write_json(json_path)
        if plot is not None:
            _draw(plot, results)
        verdicts = _check(targets, results)
        if verdicts:
            show_verdicts(verdicts, console)
        if any(result.wrong for result in results) or any(verdict.verdict == "missed" for verdict in verdicts):
            raise typer.Exit(EXIT_CODE)


def _measure(setting: Setting, command: str) -> Result:
    from hfkv.bench import MLASetting, run, run_mla

    with progress_on(Console(stderr=True, highlight=False), TaskProgressColumn()) as progress:
        task = progress.add_task("", total=1.0)
        try:

            def on_progress(what: str, share: float) -> None:
                progress.update(task, completed=share, description=f"{what:<42}")

            if isinstance(setting, MLASetting):
                return run_mla(setting, command, on_progress)
            return run(setting, command, on_progress)
        except RequestError as error:
            raise CommandError(str(error)) from error


def _targets(path: Path | None) -> list[Target]:
    from hfkv.bench import read_targets

    try:
        return [] if path is None else read_targets(path)
    except RequestError as error:
        raise CommandError(f"--check: {error}") from error


def _check(targets: list[Target], results: list[Result]) -> list[Verdict]:
    from hfkv.bench import check_results

    try:
        return check_results(targets, results) if targets else []
    except RequestError as error:
        raise CommandError(f"--check: {error}") from error


def _read(paths: list[Path]) -> list[Result]:
    from hfkv.bench import Result

    try:
        return [Result.read_json(path) for path in paths]
    except RequestError as error:
        raise CommandError(f"--from: {error}") from error


def _refuse_beside_from(context: typer.Context) -> None:
    """An earlier result is read as it is: nothing that says what to measure goes with it."""
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "")
        name = option.opts[0] if option.opts[0].startswith("--") else "a suite"
        if given is not None and given.name == "COMMANDLINE" and name not in ("--from", "--check", "--plot"):
            raise CommandError(f"--from reads earlier results and measures nothing; leave {name} out")


def _draw(path: Path, results: list[Result]) -> None:
    from hfkv.bench.plots import write_plot

    if len(results) > 1:
        raise CommandError(f"--plot draws one result and --from names {len(results)}; draw them one by one")
    write_plot(path, results[0])
