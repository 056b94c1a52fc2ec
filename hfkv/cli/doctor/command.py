"""``hfkv doctor``: what is installed, which kernels a model would use and why, and whether they are right here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskProgressColumn

from hfkv.cli.consoles import new_console
from hfkv.cli.doctor.layers import describe_layers, read_config
from hfkv.cli.doctor.machine import describe_installation
from hfkv.cli.doctor.report import DoctorReport
from hfkv.cli.doctor.screen import show
from hfkv.cli.errors import told_in_one_line
from hfkv.cli.loading import pick_device, pick_dtype, progress_on
from hfkv.cli.outputs import check_outputs

if TYPE_CHECKING:
    import torch


BUNDLED = "tiny-lm (bundled)"
# A kernel that is wrong, where nothing was wrong with the command.
EXIT_CODE = 1


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A folder, or a name on the Hub.", show_default="the bundled model")
    ] = None,
    kv: Annotated[str, typer.Option(help="The cache to look at, such as int8+window:1024+paged.")] = "none",
    device: Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16 or float16.")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file too.")] = None,
) -> None:
    """Say what is installed and which kernels a model would use, and test every kernel on this very device.

    Of a model only its config is read. Exit code 1 where a kernel is wrong.
    """
    with told_in_one_line():
        check_outputs(json_path)
        chosen_device, chosen_dtype = pick_device(device), pick_dtype(dtype)
        report = examine(model, kv, chosen_device, chosen_dtype, new_console(stderr=True))
        if json_path is not None:
            json_path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        show(report, new_console())
        if report.failures:
            raise typer.Exit(EXIT_CODE)


def examine(
    model: str | None, kv: str, device: torch.device, dtype: torch.dtype | None, bars: Console | None = None
) -> DoctorReport:
    """Looks at the installation, the layers and the kernels.

    Args:
        model: a folder, or a name on the Hub; None for the bundled model.
        kv: the cache, in words.
        device: device of queries and tokens.
        dtype: of queries; None for the one that the model's config names, or bfloat16.
        bars: where progress is drawn; None for nowhere.

    Raises:
        CommandError: the model has no config that could be read, or `kv` does not fit it.
    """
    import time

    import torch

    from hfkv import tiny_lm
    from hfkv.codecs import Codecs
    from hfkv.kernels.selftest.suite import plan
    from hfkv.policy.config import KVConfig

    config = read_config(tiny_lm.PATH if model is None else model)
    dtype = dtype or _stored_dtype(config)
    layers = describe_layers(BUNDLED if model is None else model, config, kv, dtype, device)
    codecs = Codecs.named(KVConfig.parse(kv).codec)
    planned = plan(device, dtype, layers.heads, (codecs.name,) if codecs.is_pair else ())
    checks = []
    began = time.perf_counter()
    with progress_on(bars or Console(quiet=True), TaskProgressColumn()) as progress:
        task = progress.add_task("", total=len(planned))
        for check in planned:
            progress.update(task, description=f"{check.name:<54}")
            checks.append(check.run())
            progress.advance(task)
    seconds = time.perf_counter() - began
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return DoctorReport(describe_installation(), layers, str(device), name, checks, seconds)


def _stored_dtype(config: Any) -> torch.dtype:
    import torch

    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return stored if stored in (torch.float32, torch.float16) else torch.bfloat16
