"""The words of ``hfkv bench``: what they become, in which order they come, and what is said of those that are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from hfkv.bench import SUITES
from hfkv.cli.bench.command import SUITES as COMMANDS
from hfkv.cli.bench.setting import setting_of
from tests.integration.test_cli_bench import invoke

# Of the options that all suites take, what they are worth where they are not said.
NOTHING: dict[str, Any] = dict.fromkeys(("shape", "context", "batch", "part", "steps", "seconds"))
NOTHING |= {"dtype": "auto", "device": "cpu", "peers": "all", "busy": 0, "seed": 0}


def refused(*words: str) -> str:
    """What it says: one line, and nothing on stdout."""
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["name a suite", "--from", "attention, step, memory, prefill, reuse"]),
        (["speed"], ["'speed'", "attention, step, memory, prefill, reuse"]),
        (["attention", "--shape", "huge"], ["'huge'", "llama-8b, qwen3-30b-a3b, small, host, tiny"]),
        (["attention", "--shape", "tiny", "--model", "a/b"], ["--shape and --model"]),
        (["attention", "--kv", "int9"], ["'int9'", "allowed: none, int8"]),
        (["attention", "--kv", "window:64+summary:mean"], ["no check"]),
        (["attention", "--peers", "vllm"], ["'vllm'", "DynamicCache", "QuantizedCache:fp8"]),
        (["attention", "--context", "512,x"], ["512,1024", "'512,x'"]),
        (["prefill", "--ragged", "8,4", "--batch", "2"], ["--ragged", "leave --context and --batch out"]),
        (["step", "--shape", "tiny", "--ragged", "8,4"], ["--ragged means nothing in the suite 'step'", "--context"]),
        (["step", "--shape", "llama-8b", "--device", "cpu"], ["16.1 GB of weights", "--layers"]),
        (["attention", "--shape", "tiny", "--context", "9999999999"], ["GB free", "shorter --context"]),
        (["attention", "--steps", "0"], ["steps must be at least 1"]),
        (["attention", "--dtype", "float8"], ["'float8'"]),
        (["attention", "--device", "toaster"], ["'toaster'"]),
        (["attention", "--json", "no/such/x.json"], ["no folder 'no/such'"]),
        (["attention", "--plot", "x.svg"], [".png"]),
        (["attention", "--check", "no-such.toml"], ["'no-such.toml'", "No such file"]),
        (["--from", "no-such.json"], ["'no-such.json'", "No such file"]),
        (["--from", "x.json", "--steps", "3"], ["--from reads earlier results", "--steps"]),
        (["--steps", "3", "--from", "x.json"], ["--from reads earlier results", "--steps"]),
        (["--steps", "3"], ["name a suite", "--from", "attention, step, memory, prefill, reuse"]),
        (["step", "--from", "x.json"], ["leave a suite out"]),
        (["--from", "x.json", "step"], ["leave a suite out"]),
        (["--shape", "tiny", "step", "--layers", "0"], ["layers must be at least 1"]),
        (["--layers=0", "step", "--shape", "tiny"], ["layers must be at least 1"]),
        (["step", "attention"], ["'attention' is no option of the suite 'step'", "--help"]),
        (["step", "--nonsense"], ["'--nonsense' is no option", "hfkv bench step --help"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(words: list[str], said: list[str]) -> None:
    message = refused(*words)
    for word in said:
        assert word in message


def test_defaults_follow_the_suite_and_the_device() -> None:
    def default(suite: str, shape: str | None = None) -> Any:
        return setting_of(suite, {**NOTHING, "shape": shape})

    assert tuple(COMMANDS) == SUITES
    assert (default("attention").shape, default("attention").contexts) == ("llama-8b", (32_768,))
    assert (default("step").shape, default("step").contexts) == ("small", (512, 16_384))
    assert default("prefill", "tiny").contexts == (512,)
    assert default("memory").dtype == "bfloat16"
    assert len(default("memory").kvs) == 7


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_names_the_options_it_takes(suite: str) -> None:
    page = invoke(suite, "--help", columns=200)
    assert page.exit_code == 0
    takes = COMMANDS[suite][1]
    for option in {option for _, some in COMMANDS.values() for option in some}:
        assert (f"--{option} " in page.stdout) == (option in takes), option
    assert all(f"--{option} " in page.stdout for option in ("shape", "peers", "steps", "json", "plot", "check"))
