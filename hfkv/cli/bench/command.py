"""``hfkv bench``: what caches and experts cost in time and memory, side by side, each beside its floor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TaskProgressColumn
from typer.core import TyperGroup

from hfkv.cli.consoles import new_console
from hfkv.cli.errors import CommandError, told_in_one_line
from hfkv.cli.loading import progress_on
from hfkv.cli.outputs import check_outputs
from hfkv.cli.said import command_line
from hfkv.policy.errors import RequestError

if TYPE_CHECKING:
    from hfkv.bench import Result

# What is wrong with a result, where nothing was wrong with the command.
EXIT_CODE = 1
# By suite: what a step of it is, and which of the options that say what to measure it takes.
_OF_CACHES = ("model", "layers", "context", "batch", "kv")
SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention": ("One layer's update and attention of a decode step.", _OF_CACHES),
    "step": ("A whole decode step of generate().", _OF_CACHES),
    "memory": ("Bytes held, allocated, and needed during a step.", _OF_CACHES),
    "prefill": ("A prompt to its first new token.", (*_OF_CACHES, "ragged")),
    "reuse": ("A prompt whose beginning an earlier call has read, to its first new token.", _OF_CACHES),
    "host": ("What a decode step costs in Python and dispatch, in CPU time.", (*_OF_CACHES, "ragged")),
    "moe": ("One call of a layer's experts.", ("tokens", "moe")),
    "mla": (
        "Latent attention (DeepSeek), by parts: decode and prefill of one layer, step of four, crossover of its forms.",
        ("model", "layers", "batch", "kv", "tokens", "part", "queries"),
    ),
}
_SOME_TAKE = {option for _, takes in SUITES.values() for option in takes}
# Every option once: of what kind it is, what is said of it, and its default, in brackets where it is worked out.
_OPTIONS: dict[str, tuple[type, str, Any]] = {
    "shape": (
        str,
        "llama-8b, qwen3-30b-a3b, small, tiny or host; in moe: moe-small, qwen3-30b-a3b, mixtral-8x7b or moe-tiny; "
        "in mla: deepseek-v2-lite, deepseek-v3 or mla-tiny.",
        "(llama-8b; on a CPU whole models: small; host: host; moe: moe-small, mla: deepseek-v2-lite)",
    ),
    "model": (str, "The shape of a model: a folder, or a name on the Hub.", None),
    "layers": (int, "Layers to build, or to take turns over.", None),
    "context": (str, "Tokens, such as 512,16384.", "(by suite and shape)"),
    "batch": (int, "Rows.", "(1)"),
    "ragged": (str, "Real tokens of each left-padded row, 8192,4096.", None),
    "dtype": (str, "auto (bfloat16), float32, bfloat16 or float16.", "auto"),
    "device": (str, "auto (the accelerator if there is one), cpu, cuda …", "auto"),
    "kv": (
        list[str],
        "A cache of hfkv's; may be given again. In step with +graphs behind it: from CUDA graphs.",
        "(none, int8, int4, fp8, paged, int8+paged, window:1024; mla: none, int8, int4, paged)",
    ),
    "tokens": (
        str,
        "moe: tokens of a call. mla: tokens held; in its part prefill, without --queries, of a prompt.",
        "(moe: 1,8,128,1024; on a GPU 1,32,128,4096; mla: by part)",
    ),
    "part": (str, "decode, step, prefill, crossover.", "(all of them)"),
    "queries": (str, "New tokens at once in crossover, and in prefill behind those held.", "(by part)"),
    "moe": (
        list[str],
        "How hfkv keeps the experts; may be given again. With +lora behind it: under adapters.",
        "(auto, int8, int4, auto+lora)",
    ),
    "peers": (str, "all, or names with commas; see docs/reference/bench.md.", "all"),
    "steps": (int, "Timed steps of each.", "(as many as fit in --seconds)"),
    "seconds": (float, "How long all take turns at a context, at least.", "(10; moe, mla: 4)"),
    "busy": (int, "Other processes that spin meanwhile, to see what a shared CPU does.", 0),
    "seed": (int, "Of the random weights, keys, values and tokens.", 0),
    "json": (Path, "Write the numbers to this file too.", None),
    "plot": (Path, "Draw them as this PNG file.", None),
    "check": (Path, "Hold them against the ratios of this TOML file.", None),
    "from": (list[Path], "Show and check this file of --json; may be given again.", None),
}
# What no option is goes to the command, which says so.
_ANY_WORDS = {"ignore_unknown_options": True, "allow_extra_args": True}


def _with_options(command: Callable[..., None], names: Iterable[str]) -> Callable[..., None]:
    """The command with the options of these names, for typer to see; it is called with their values by name."""
    parameters = [inspect.Parameter("context_", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name in names:
        kind, said, default = _OPTIONS[name]
        is_worked_out = isinstance(default, str) and default.startswith("(")
        option = typer.Option(f"--{name}", help=said, show_default=default.strip("()") if is_worked_out else True)
        if default is None or is_worked_out:
            kind, default = kind | None, None  # type: ignore[assignment]
        parameters.append(
            inspect.Parameter(
                f"{name}_" if name == "from" else name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, option],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


class _Suites(TyperGroup):
    """The commands of the suites, which may come behind their options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        index = 0
        while index < len(args) and args[index].startswith("-"):
            # Every option takes a word.
            index += 1 if "=" in args[index] or args[index] in ("-h", "--help") else 2
        return super().parse_args(ctx, [*args[index : index + 1], *args[:index], *args[index + 1 :]])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        with told_in_one_line():
            if args[0].startswith("-"):
                if ctx.params.get("from_") or "--from" in args:
                    raise CommandError(f"--from reads earlier results and measures nothing; leave {args[0]} out")
                _ask_for_a_suite("name a suite, or a result with --from")
            if args[0] not in SUITES:
                _ask_for_a_suite(f"the suite {args[0]!r} is unknown")
        return super().resolve_command(ctx, args)


def _ask_for_a_suite(why: str) -> None:
    raise CommandError(f"{why}; allowed: {', '.join(SUITES)}")


def _earlier(context_: typer.Context, from_: list[Path] | None, plot: Path | None, check: Path | None) -> None:
    """Time caches, or experts, side by side in one run: hfkv's and transformers' own, each beside its floor.

    Random weights of real shapes; nothing is downloaded.
    """
    if context_.invoked_subcommand is not None:
        return
    with told_in_one_line():
        if not from_:
            _ask_for_a_suite("name a suite, or a result with --from")
        _report(lambda: _read(from_ or []), None, plot, check)


def _command(suite: str, takes: tuple[str, ...]) -> Callable[..., None]:
    def command(
        context_: typer.Context, json: Path | None, plot: Path | None, check: Path | None, **given: Any
    ) -> None:
        with told_in_one_line():
            if context_.args:
                raise CommandError(_means_nothing(context_.args[0].partition("=")[0], suite, takes))
            said = command_line(context_, "hfkv", "bench", suite)
            _report(lambda: [_measure(suite, given, said)], json, plot, check)

    return _with_options(command, [name for name in _OPTIONS if name in takes or name not in {*_SOME_TAKE, "from"}])


bench = typer.Typer(cls=_Suites, invoke_without_command=True, context_settings=_ANY_WORDS)
bench.callback()(_with_options(_earlier, ("from", "plot", "check")))
for _suite, (_what, _takes) in SUITES.items():
    bench.command(_suite, help=_what, context_settings=_ANY_WORDS)(_command(_suite, _takes))


def _means_nothing(word: str, suite: str, takes: tuple[str, ...]) -> str:
    if word == "--from":
        return "--from reads earlier results and measures nothing; leave a suite out"
    if word.removeprefix("--") not in _OPTIONS:
        return f"{word!r} is no option of the suite {suite!r}; hfkv bench {suite} --help lists them"
    others = ", ".join(f"--{option}" for option in takes)
    return f"{word} means nothing in the suite {suite!r}; it takes {others}; leave it out"


def _report(results_of: Callable[[], list[Result]], json: Path | None, plot: Path | None, check: Path | None) -> None:
    """Shows, writes, draws and checks results."""
    check_outputs(json, plot, check=check)
    from hfkv.bench import check_results, read_targets
    from hfkv.cli.bench.screen import show, show_verdicts

    with _told("--check: "):
        targets = [] if check is None else read_targets(check)
    results = results_of()
    console = new_console()
    for result in results:
        show(result, console)
    if json is not None:
        results[0].write_json(json)
    if plot is not None:
        from hfkv.bench.plots import write_plot

        if len(results) > 1:
            raise CommandError(f"--plot draws one result and --from names {len(results)}; draw them one by one")
        write_plot(plot, results[0])
    with _told("--check: "):
        verdicts = check_results(targets, results) if targets else []
    if verdicts:
        show_verdicts(verdicts, console)
    if any(result.wrong for result in results) or any(verdict.verdict == "missed" for verdict in verdicts):
        raise typer.Exit(EXIT_CODE)


def _measure(suite: str, given: dict[str, Any], command: str) -> Result:
    from hfkv.bench import run
    from hfkv.cli.bench.setting import setting_of

    setting = setting_of(suite, given)
    with progress_on(new_console(stderr=True), TaskProgressColumn()) as progress:
        task = progress.add_task("", total=1.0)
        return run(
            setting,
            command,
            lambda what, share: progress.update(task, completed=share, description=f"{what:<42}"),
        )


def _read(paths: list[Path]) -> list[Result]:
    from hfkv.bench import Result

    with _told("--from: "):
        return [Result.read_json(path) for path in paths]


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Says which option a refusal is about."""
    try:
        yield
    except RequestError as error:
        raise CommandError(f"{where}{error}") from error
