"""``hfkv eval``: what caches cost a model on a text, against the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskProgressColumn

from hfkv.cli.consoles import new_console
from hfkv.cli.errors import CommandError, told_in_one_line
from hfkv.cli.eval.runs import (
    BUNDLED,
    BUNDLED_TEXT,
    DEFAULT_KV,
    DEFAULT_TOKENS,
    EvalReport,
    EvalSetting,
    find,
    measure,
)
from hfkv.cli.eval.screen import show
from hfkv.cli.loading import load, loading_bars, pick_device, pick_dtype, progress_on
from hfkv.cli.outputs import check_apart, check_can_draw, check_outputs
from hfkv.cli.said import command_line, whole_numbers


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A folder, or a name on the Hub.", show_default="the bundled model")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to score.", show_default="the bundled held-out text")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 text on which --kv auto:0.5% finds its codecs, and of which keys have a mean.",
            show_default="a bundled one",
        ),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(help="A cache to compare; may be given again.", show_default=", ".join(DEFAULT_KV)),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option("--context", help="Tokens of a block.", show_default=f"{EvalSetting.context}")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read one endless text instead of blocks.")] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text to score.", show_default=f"{DEFAULT_TOKENS}, or all")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens a forward; 1 reads as generation does.")] = EvalSetting.chunk,
    pass_keys: Annotated[bool, typer.Option(help="Hide pass keys and ask for them.")] = True,
    pass_key_lengths: Annotated[str, typer.Option(help="Tokens of their prompts.")] = ",".join(
        map(str, EvalSetting.lengths)
    ),
    pass_key_depths: Annotated[int, typer.Option(help="Depths they lie at.")] = EvalSetting.num_depths,
    trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = EvalSetting.trials,
    lora: Annotated[str | None, typer.Option(help="A PEFT adapter for the model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda, cuda:1 …")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them as PNG files in this folder.")] = None,
) -> None:
    """Measure what caches cost a model: loss, forecasts, attention, bytes and pass keys, against the full cache."""
    import torch

    from hfkv.eval.reader import each_warning_once

    with told_in_one_line():
        if stream and context_tokens is not None:
            raise CommandError("--stream reads the text as one and --context cuts it into blocks; give one of them")
        if not pass_keys:
            _refuse_of_pass_keys(context)
        setting = EvalSetting(
            kvs=tuple(kv or DEFAULT_KV),
            context=None if stream else EvalSetting.context if context_tokens is None else context_tokens,
            tokens=tokens,
            chunk=chunk,
            lengths=whole_numbers("--pass-key-lengths", pass_key_lengths) if pass_keys else (),
            num_depths=pass_key_depths,
            trials=trials,
        )
        _refuse_words(setting.kvs, calibration)
        _check_outputs(json_path, plot, text, calibration)
        words, probe = _read_text("--text", text), _read_text("--calibration", calibration)
        chosen_dtype, chosen_device = pick_dtype(dtype), pick_device(device)
        if model is None:
            # See `hfkv demo`: the bundled model is too small for more threads to pay.
            torch.set_num_threads(1)
        bars = new_console(stderr=True)
        with loading_bars(bars):
            loaded, tokenizer = load(model, chosen_dtype, chosen_device, lora)
        with each_warning_once():
            found = find(loaded, tokenizer, setting, probe)
        with each_warning_once(), progress_on(bars, TaskProgressColumn()) as progress:
            task = progress.add_task("", total=None)
            report = measure(
                loaded,
                tokenizer,
                words,
                setting,
                (model or BUNDLED, str(text or BUNDLED_TEXT)),
                found,
                probe,
                lambda total: progress.update(task, total=total),
                lambda what, count: progress.update(task, advance=count, description=f"{what:<32}"),
            )
        show(report, new_console())
        if json_path is not None:
            report.write_json(json_path, command_line(context, "hfkv", "eval"))
        if plot is not None:
            _write_plots(report, plot)


def _refuse_of_pass_keys(context: typer.Context) -> None:
    for name in ("pass_key_lengths", "pass_key_depths", "trials"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise CommandError(
                f"--{name.replace('_', '-')} is about pass keys, and --no-pass-keys hides none; give one"
            )


def _read_text(option: str, path: Path | None) -> str:
    from hfkv import tiny_lm

    if path is None:
        return tiny_lm.held_out_text() if option == "--text" else tiny_lm.calibration_text()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{option} {str(path)!r} is not UTF-8 (byte {error.start}: {error.reason}); convert it first"
        ) from error
    except OSError as error:
        raise CommandError(f"{option} {str(path)!r} could not be read: {error.strerror}; name a text file") from error
    if not text.strip():
        raise CommandError(f"{option} {str(path)!r} is empty; give a file with some text in it")
    return text


def _check_outputs(
    json_path: Path | None, plot_folder: Path | None, text: Path | None, calibration: Path | None
) -> None:
    """Refuses what could not be written, before anything is measured."""
    check_outputs(json_path, text=text)
    check_apart(json=json_path, calibration=calibration)
    if plot_folder is None:
        return
    check_apart(json=json_path, plot=plot_folder)
    check_can_draw()
    try:
        plot_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"--plot {str(plot_folder)!r} cannot be a folder: {error.strerror}; name one that can be written to"
        ) from error


def _write_plots(report: EvalReport, folder: Path) -> None:
    import torch

    from hfkv.eval import write_plots

    grids = {row.text.kv: torch.tensor(row.pass_keys) for row in report.rows if row.pass_keys is not None}
    write_plots(folder, [row.text for row in report.rows], grids, report.setting.lengths, report.depths)


def _refuse_words(kvs: tuple[str, ...], calibration: Path | None) -> None:
    from hfkv.patches.keys.means import wants_means
    from hfkv.policy.config import KVConfig

    readers = 0
    for kv in kvs:
        try:
            config = KVConfig.parse(kv)
        except (TypeError, ValueError):
            continue  # said where the cache is made
        readers += config.loss_change is not None or wants_means(config)
        if config.reuse is not None:
            raise CommandError(f"--kv {kv!r}: reuse shares prompts between calls and changes no forecast; leave it out")
    if calibration is not None and not readers:
        raise CommandError(
            "--calibration is what codecs are found on, and the mean of keys for codecs below 8 bits; give a promise "
            "too, such as --kv auto:0.5%, or such a codec"
        )
