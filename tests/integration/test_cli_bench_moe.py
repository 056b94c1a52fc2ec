"""``hfkv bench moe``: what it prints and writes, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfkv.bench.suites.moe import PEAK_SIZE
from hfkv.cli.bench.setting import setting_of
from hfkv.measure.timing import COPY_BYTES
from tests.integration.test_cli_bench import invoke
from tests.integration.test_cli_bench_words import NOTHING, refused


def test_experts_of_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(PEAK_SIZE, "cpu", 128)
    path = tmp_path / "bench.json"
    targets = tmp_path / "targets.toml"
    basis = '[[ratio]]\nsuite = "moe"\ncontext = 4\nagainst = "grouped_mm"\ncontender = "hfkv int8"\n'
    targets.write_text(f"{basis}max_held = 0.3\n{basis}max_held = 0.1\n")
    words = ["--shape", "moe-tiny", "--tokens", "1,4", "--steps", "2", "--dtype", "float32", "--device", "cpu"]
    ours = ["--moe", "auto", "--moe", "int8", "--peers", "grouped_mm"]
    result = invoke("moe", *words, *ours, "--json", str(path), "--check", str(targets))
    assert result.exit_code == 1, result.output
    assert "1 held, 1 missed" in result.stdout
    assert "moe: moe-tiny (H 128, I 192, E 8, K 2), float32, 4 tokens" in result.stdout
    content = json.loads(path.read_text())
    for table in content["tables"]:
        assert [row["contender"] for row in table["rows"]] == ["grouped_mm", "hfkv", "hfkv int8"]
        assert all(row["status"] == "ok" and row["num_samples"] == 2 for row in table["rows"])
    again = invoke("--from", str(path))
    assert (again.exit_code, again.stdout) == (0, result.stdout[: len(again.stdout)])
    shown = [line.split() for line in again.stdout.splitlines() if line.split()[:2] == ["hfkv", "int8"]]
    assert [line[-1] for line in shown] == [f"{table['rows'][2]['error_full']:.1e}" for table in content["tables"]]


def test_defaults_of_experts_follow_the_device() -> None:
    setting = setting_of("moe", NOTHING)
    assert (setting.shape, setting.contexts, setting.dtype) == ("moe-small", (1, 8, 128, 1024), "bfloat16")
    assert setting.moes == ("auto", "int8", "int4", "auto+lora")
    assert setting.peers is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["moe", "--shape", "tiny"], ["'tiny'", "moe-small, qwen3-30b-a3b, mixtral-8x7b"]),
        (["moe", "--context", "8"], ["--context means nothing in the suite 'moe'", "--tokens"]),
        (["moe", "--kv", "int8"], ["--kv means nothing", "--moe"]),
        (["moe", "--model", "a/b"], ["--model means nothing"]),
        (["moe", "--ragged", "8,4"], ["--ragged means nothing"]),
        (["moe", "--tokens", "1,x"], ["--tokens", "'1,x'"]),
        (["moe", "--moe", "int9"], ["'int9'", "allowed: auto"]),
        (["moe", "--moe", "int8", "--moe", "int8"], ["different experts"]),
        (["moe", "--peers", "DynamicCache"], ["'DynamicCache'", "grouped_mm, batched_mm, eager, PEFT"]),
        (["step", "--tokens", "8"], ["--tokens means nothing in the suite 'step'", "--context"]),
        (["step", "--moe", "int8"], ["--moe means nothing"]),
    ],
)
def test_a_mistake_about_experts_is_one_line_with_the_remedy(words: list[str], said: list[str]) -> None:
    message = refused(*words, *(["--device", "cpu"] if words[0] == "moe" else []))
    for word in said:
        assert word in message
