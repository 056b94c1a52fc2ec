"""The commands of ``hfkv``. Each is one module, and its work a function that needs no terminal."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from hfkv.cli.bench.command import bench
from hfkv.cli.demo.command import demo
from hfkv.cli.doctor.command import doctor
from hfkv.cli.eval.command import evaluate
from hfkv.cli.generate import generate
from hfkv.cli.plan.command import plan

app = typer.Typer(
    name="hfkv",
    help="Smaller KV caches for Hugging Face transformers, exact where they say so.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hfkv {version('hfkv')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


app.command()(demo)
app.command()(generate)
app.command()(plan)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")
app.command()(doctor)
