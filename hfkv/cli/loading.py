"""Models for the command line: found, loaded under a progress bar, or refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import StreamHandler, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from hfkv.cli.errors import CommandError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for ``"auto"``: the one the weights are stored in."""
    import torch

    if name not in DTYPES:
        raise CommandError(f"--dtype {name!r} is unknown; allowed: {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)


def pick_device(name: str) -> torch.device:
    """The device of that name, made sure of; ``"auto"`` is the accelerator, or the CPU where there is none."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    present = ["cpu"]
    if accelerator is not None:
        present += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = device is not None and (
        (device.type == "cpu" and not device.index)
        or (accelerator is not None and device.type == accelerator.type and (device.index or 0) < len(present) - 1)
    )
    if device is None or not there:
        raise CommandError(f"--device {name!r} is not there; this torch sees {', '.join(present)}")
    return device


def load(
    name: str | None, dtype: torch.dtype | None, device: torch.device, lora: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a causal language model, its tokenizer and an adapter.

    Args:
        name: a folder, or a name on the Hub; None for the bundled model.
        dtype: dtype of the weights; None for the stored one.
        device: where the weights go.
        lora: a PEFT adapter's folder or name; may be None.

    Returns:
        The model, a `PeftModel` where there is an adapter, in evaluation mode, and the tokenizer.

    Raises:
        CommandError: one of them cannot be had.
    """
    from hfkv import tiny_lm

    source = tiny_lm.PATH if name is None else _checked(name, "--model", "config.json")
    model, tokenizer = _load_base(source, dtype, device)
    if lora is not None:
        model = _add_adapter(model, lora)
    return model.eval(), tokenizer


def _load_base(
    source: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Straight to the accelerator: no second copy in host memory.
        place = {} if device.type == "cpu" else {"device_map": {"": device}}
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **place), tokenizer
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise CommandError(
            f"--model {source!r} could not be loaded as a causal language model: {first_line(error)} "
            "Give a folder that save_pretrained wrote, tokenizer included, or a name on the Hub."
        ) from error


def _add_adapter(model: PreTrainedModel, lora: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise CommandError("--lora needs PEFT, which is not installed: pip install 'hfkv[lora]'") from None
    try:
        return PeftModel.from_pretrained(model, _checked(lora, "--lora", "adapter_config.json"))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise CommandError(
            f"--lora {lora!r} could not be put on {type(model).__name__}: {first_line(error)} "
            "Give the folder of a PEFT adapter trained on this model."
        ) from error


def _checked(name: str, option: str, needed: str) -> str:
    """A folder with the `needed` file in it, or what may be a name on the Hub."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / needed).exists():
            raise CommandError(f"{option} {name!r} is a folder without {needed}; give the one save_pretrained wrote")
        return str(folder)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CommandError(
            f"{option} {name!r} is no folder here; give one that exists, or a name on the Hub (org/name)"
        )
    return name


@contextmanager
def progress_on(console: Console, *columns: ProgressColumn) -> Iterator[Progress]:
    """A progress display that leaves nothing behind, and draws nothing where `console` is no terminal."""
    progress = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=None),
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )
    handlers = [handler for handler in getLogger("transformers").handlers if type(handler) is StreamHandler]
    streams = [handler.stream for handler in handlers]
    with progress:
        # By now sys.stderr is rich's, which prints above the bar: what transformers logs must go there too.
        for handler in handlers:
            handler.setStream(sys.stderr)
        try:
            yield progress
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.setStream(stream)


@contextmanager
def loading_bars(console: Console) -> Iterator[None]:
    """Draws transformers' loading bars on `console`, each gone when it is done."""
    from transformers.utils import logging

    with progress_on(console) as progress:
        progress.add_task("loading", total=None)
        before = logging.set_tqdm_hook(lambda factory, args, kwargs: _Bar(progress, *args, **kwargs))
        try:
            yield
        finally:
            logging.set_tqdm_hook(before)


class _Bar:
    """What transformers uses of tqdm, on a rich progress display."""

    def __init__(self, progress: Progress, iterable: Any = None, *_: Any, **options: Any) -> None:
        self._progress = progress
        self._iterable = iterable
        total = options.get("total")
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self._task = progress.add_task(str(options.get("desc") or "loading").lower(), total=total)

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()
        self.close()

    def update(self, count: float = 1) -> None:
        self._progress.advance(self._task, count)

    def close(self) -> None:
        if self._task in self._progress.task_ids:
            self._progress.remove_task(self._task)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        # set_description, set_postfix, refresh and the like: nothing to show.
        return lambda *args, **kwargs: None
