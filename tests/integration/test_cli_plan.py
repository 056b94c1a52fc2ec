"""`hfkv plan`: its tables, its files, no network, and one red line for what is wrong."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hfkv
from hfkv.cli.commands import app
from tests.tiny import llama_config

SPEEDS = ("--bandwidth", "1TB/s", "--bus", "50GB/s")


def invoke(*words: str, columns: int = 100) -> Any:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["plan", *words])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config-only")
    llama_config().save_pretrained(path)
    return str(path)


def test_the_shape_is_planned_without_a_network(no_network: None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = invoke("llama-8b", "--memory", "24GiB", *SPEEDS, "--json", str(path))
    assert result.exit_code == 0, result.output
    for words in (
        "llama-8b: 1 row of 131,072 tokens in 24.0 GiB (as given), cuda",
        "bf16",
        "Take bf16 weights and kv='int8'",
        "1,000 GB/s (as given)",
        "prefill_chunk_size=2048",
    ):
        assert words in result.stdout
    assert re.search(r"none +16\.0 .*no +no +yes", result.stdout)
    assert re.search(r"int8 +8\.12 .*yes +yes +yes +131,072\*", result.stdout)
    numbers = json.loads(path.read_text())
    plan = hfkv.memory_plan("llama-8b", "24GiB", bandwidth="1TB/s", bus="50GB/s")
    assert numbers == json.loads(json.dumps(plan.as_json()))
    assert numbers["caches"][0]["kv_bytes"] == 16 * 2**30
    assert numbers["weights"][0]["nbytes"] == 16_060_523_008


def test_speeds_are_measured_where_none_is_given(folder: str) -> None:
    result = invoke(folder, "--memory", "1GiB", "--device", "cpu", "--kv", "int8")
    assert result.exit_code == 0, result.output
    assert "measured by a copy on this machine's cpu" in " ".join(result.stdout.split())


def test_a_folder_with_nothing_but_a_config_is_enough(folder: str) -> None:
    words = (folder, "--context", "1k", "--batch", "4", "--kv", "int4+paged", "--kv", "int8", "--device", "cpu")
    result = invoke(*words, "--reply", "100", "--dtype", "float32", "--weights", "int8", *SPEEDS)
    assert result.exit_code == 0, result.output
    for text in (
        "4 rows of 1,024 tokens",
        "free on this machine",
        "int4+paged",
        "Take int8 weights",
        "float32 for keys",
    ):
        assert text in " ".join(result.stdout.split())
    assert "more than the model was made for (512)" in " ".join(result.stdout.split())
    assert "fp8" not in result.stdout


def test_what_does_not_fit_is_said_and_what_would() -> None:
    for memory, words in (("0.51GiB", "lack"), ("2GiB", "tokens would.")):
        result = invoke("small", "--memory", memory, "--kv", "none", *SPEEDS)
        assert result.exit_code == 0, result.output
        assert "Nothing of this fits" in result.stdout
        assert words in " ".join(result.stdout.split())


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_it_keeps_to_the_width(columns: int, folder: str) -> None:
    words = ("--kv", "none+offload", "--kv", "int8+window:64+sinks:2+global_layers:0", "--kv", "int4")
    result = invoke(folder, "--memory", "1GiB", *words, *SPEEDS, columns=columns)
    assert result.exit_code == 0, result.output
    # The head names the folder, as given.
    lines = [line.rstrip() for line in result.stdout.splitlines() if folder[:20] not in line]
    assert max(len(line) for line in lines) <= columns
    assert "…" not in result.stdout
    assert "longest" in result.stdout
    # What a terminal of 80 columns has no room for.
    assert (re.search(r"with +fits with", result.stdout) is not None) == (columns > 80)


def test_a_plan_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke("tiny", "--memory", "1GiB", *SPEEDS, "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("tiny", "--memory", "1GiB", *SPEEDS, "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 2
    assert "hfkv[plot]" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llama-9b",), "neither a shape (llama-8b, qwen3-30b-a3b, small, host, tiny)"),
        (("tiny", "--memory", "lots"), "memory takes a size"),
        (("tiny", "--context", "12kb"), "--context takes a number of tokens"),
        (("tiny", "--context", "0"), "--context takes a number of tokens"),
        (("tiny", "--batch", "0"), "batch must be a whole number of at least 1"),
        (("tiny", "--context", "100", "--reply", "101"), "reply must be a part of the context"),
        (("tiny", "--dtype", "float32", "--weights", "bf16"), "--dtype"),
        (("tiny", "--memory", "1GiB", "--kv", "offload+device_budget:1B"), "less than a page of each"),
        (("tiny", "--reply", "0"), "reply must be a whole number of at least 1"),
        (("tiny", "--kv", "int7"), "int7"),
        (("tiny", "--kv", "window:9+global_layers:7"), "names layer 7"),
        (("tiny", "--weights", "int3"), "allowed: auto, bf16, int8, int4"),
        (("tiny", "--device", "tpu"), "--device 'tpu' is unknown"),
        (("tiny", "--dtype", "int8"), "--dtype 'int8' is unknown"),
        (("tiny", "--bandwidth", "fast"), "bandwidth takes a speed"),
        (("tiny", "--json", "nowhere/plan.json"), "there is no folder"),
        (("tiny", "--plot", "plan.jpg"), "must be a PNG file"),
    ],
)
def test_a_mistake_is_one_red_line(words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
