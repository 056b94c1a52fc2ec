"""``hfkv bench``: what it prints and writes, what it refuses to tell, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AttentionInterface
from typer.testing import CliRunner

import hfkv
from hfkv.attention.function import hfkv_attention
from hfkv.bench import PEERS, Result, read_targets
from hfkv.cli.bench.screen import show
from hfkv.cli.commands import app
from tests.tiny import llama

SMALL = ["--shape", "tiny", "--context", "64", "--steps", "2", "--dtype", "float32", "--device", "cpu"]
TARGET = '[[ratio]]\nsuite = "{suite}"\ncontender = "int8"\ncontext = 64\nat_least = {ratio}\n'


def invoke(*words: str, columns: int = 120) -> Any:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["bench", *words])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    pytest.importorskip("matplotlib", reason='the picture needs matplotlib: pip install "hfkv[plot]"')
    folder = tmp_path_factory.mktemp("bench")
    words = ["attention", *SMALL, "--context", "64,96", "--kv", "none", "--kv", "int8+paged", "--seed", "3"]
    result = invoke(*words, "--json", str(folder / "bench.json"), "--plot", str(folder / "bench.png"))
    assert result.exit_code == 0, result.output
    return result, json.loads((folder / "bench.json").read_text()), folder


def cells(output: str, contender: str) -> list[list[str]]:
    """The cells of the rows of a contender, one a table."""
    return [line.split() for line in output.splitlines() if line.split()[:1] == [contender]]


def test_the_table_has_what_the_json_has(measured: tuple[Any, dict[str, Any], Path]) -> None:
    result, content, _ = measured
    assert result.stderr == ""
    assert [table["context"] for table in content["tables"]] == [64, 96]
    shown = result.stdout.split("attention: tiny")[1:]
    for table, screen in zip(content["tables"], shown, strict=True):
        assert f"1 × {table['context']} tokens" in screen
        assert [row["contender"] for row in table["rows"] if row["is_ours"]] == ["none", "int8+paged"]
        assert {row["contender"] for row in table["rows"] if not row["is_ours"]} == set(PEERS)
        for row in table["rows"]:
            line = cells(screen, row["contender"])[0]
            if row["status"] == "left out":
                assert line[1:3] == ["left", "out"]
                assert cells(screen, row["contender"])[1][3:5] == row["note"].split()[:2]
                assert (row["p50_ms"], row["speedup"], row["held_bytes"]) == (None, None, None)
                continue
            assert f"{row['error_full']:.1e}" == line[-1]
            assert f"{row['speedup']:.2f}" in line
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["num_samples"] == 2
            assert row["floor_ms"] == pytest.approx(1e3 * row["read_bytes"] / content["copy_bytes_per_second"])
            assert row["floor_ratio"] == pytest.approx(row["p50_ms"] / row["floor_ms"])


def test_ratios_are_to_the_fastest_peer(measured: tuple[Any, dict[str, Any], Path]) -> None:
    for table in measured[1]["tables"]:
        rows = [row for row in table["rows"] if row["status"] == "ok"]
        best = min(row["p50_ms"] for row in rows if not row["is_ours"])
        assert len(rows) == 4
        assert all(row["speedup"] == pytest.approx(best / row["p50_ms"]) for row in rows)


def test_the_json_says_how_to_measure_again(measured: tuple[Any, dict[str, Any], Path]) -> None:
    _, content, folder = measured
    assert content["command"].startswith("hfkv bench attention --shape tiny --context 64,96 --dtype float32")
    assert content["command"].endswith(f"--seed 3 --json {folder / 'bench.json'} --plot {folder / 'bench.png'}")
    assert (content["seed"], content["shape"], content["dtype"], content["model_layers"]) == (3, "tiny", "float32", 2)
    machine = content["machine"]
    assert (machine["torch"], machine["hfkv"]) == (torch.__version__, hfkv.__version__)
    assert machine["transformers"] == transformers.__version__
    assert (machine["device"], machine["accelerator"], machine["driver"]) == ("cpu", None, None)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1


def test_the_picture_is_written(measured: tuple[Any, dict[str, Any], Path]) -> None:
    content = (measured[2] / "bench.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_an_earlier_result_is_shown_drawn_and_checked(
    measured: tuple[Any, dict[str, Any], Path], tmp_path: Path
) -> None:
    path = measured[2] / "bench.json"
    again = invoke("--from", str(path), "--plot", str(tmp_path / "again.png"))
    assert (again.exit_code, again.stdout) == (0, measured[0].stdout)
    assert (tmp_path / "again.png").exists()
    targets = tmp_path / "targets.toml"
    for ratio, code, word in ((1e-9, 0, "held"), (1e9, 1, "missed")):
        targets.write_text(TARGET.format(suite="attention", ratio=ratio).replace("int8", "int8+paged"))
        checked = invoke("--from", str(path), "--check", str(targets))
        assert checked.exit_code == code, checked.output
        assert f"1 {word}" in checked.stdout
    targets.write_text(TARGET.format(suite="attention", ratio=1.0))
    named = invoke("--from", str(path), "--check", str(targets))
    assert named.exit_code == 2
    assert "no row 'int8'" in named.stderr


def test_a_check_follows_a_measurement(tmp_path: Path) -> None:
    targets = tmp_path / "targets.toml"
    targets.write_text(TARGET.format(suite="step", ratio=1e9))
    words = ["step", *SMALL, "--kv", "int8", "--peers", "DynamicCache", "--check", str(targets)]
    result = invoke(*words)
    assert result.exit_code == 1
    assert "1 missed" in result.stdout
    assert "≥ 1e+09" in result.stdout


def zeros(*args: Any, **kwargs: Any) -> Any:
    output, weights = hfkv_attention(*args, **kwargs)
    return torch.zeros_like(output), weights


@pytest.mark.parametrize("suite", ["attention", "step", "memory", "prefill", "reuse"])
def test_no_speed_is_told_of_a_wrong_contender(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "hfkv", zeros)
    path = tmp_path / "bench.json"
    result = invoke(suite, *SMALL, "--kv", "none", "--peers", "DynamicCache", "--json", str(path))
    assert result.exit_code == 1, result.output
    stock, ours = json.loads(path.read_text())["tables"][0]["rows"]
    assert (stock["status"], ours["status"]) == ("ok", "wrong")
    assert (ours["p50_ms"], ours["speedup"], ours["floor_ratio"]) == (None, None, None)
    assert cells(result.stdout, "none")[0][1] == "wrong"
    assert "allowed" in ours["note"]


def test_steps_of_generate(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    words = ["--kv", "none", "--kv", "int8", "--peers", "no-cache,QuantizedCache:fp8", "--json", str(path)]
    result = invoke("step", *SMALL, "--batch", "2", *words)
    assert result.exit_code == 0, result.output
    rows = {row["contender"]: row for row in json.loads(path.read_text())["tables"][0]["rows"]}
    assert list(rows) == ["DynamicCache", "no-cache", "QuantizedCache:fp8", "none", "int8"]
    assert all(row["num_samples"] == 4 for row in rows.values())
    assert rows["DynamicCache"]["error_logits"] == 0
    assert rows["none"]["error_logits"] < 1e-5 < rows["int8"]["error_logits"]
    assert rows["no-cache"]["error_logits"] is None
    held = 2 * 2 * 64 * 2 * 2 * 64 * 4
    assert rows["none"]["held_bytes"] == rows["DynamicCache"]["held_bytes"] == held
    weights = rows["no-cache"]["read_bytes"]
    assert weights > 0
    assert rows["none"]["read_bytes"] == weights + held


def test_a_long_text_is_not_read_again_at_every_step() -> None:
    result = invoke("step", *SMALL, "--context", "4096", "--kv", "none", "--peers", "no-cache")
    assert result.exit_code == 0, result.output
    assert cells(result.stdout, "no-cache")[0][1:3] == ["left", "out"]
    assert "2,048 tokens at most" in " ".join(result.stdout.split())


def test_a_ragged_prompt(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    words = ["--shape", "tiny", "--steps", "1", "--dtype", "float32", "--ragged", "48,17,1", "--json", str(path)]
    result = invoke("prefill", *words, "--kv", "none", "--kv", "paged", "--peers", "DynamicCache")
    assert result.exit_code == 0, result.output
    assert "left-padded rows of 48, 17, 1 tokens" in result.stdout
    (table,) = json.loads(path.read_text())["tables"]
    assert (table["context"], table["batch"], table["ragged"]) == (48, 3, [48, 17, 1])
    assert all(row["error_logits"] < 1e-5 for row in table["rows"])
    assert all(row["floor_ms"] is None for row in table["rows"])


def test_memory_counts_what_is_held_allocated_and_needed(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = invoke("memory", *SMALL, "--context", "2048", "--kv", "none", "--kv", "int8", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = {row["contender"]: row for row in json.loads(path.read_text())["tables"][0]["rows"]}
    stock, none, int8 = (rows[name] for name in ("DynamicCache", "none", "int8"))
    full = 2048 * 2 * 2 * 64 * 4
    assert stock["held_bytes"] == stock["allocated_bytes"] == none["held_bytes"] == full
    assert int8["held_bytes"] == full * (64 + 2) // (64 * 4)
    # torch.cat makes the new keys while the old keys and values are there.
    assert 1.45 * full < stock["peak_bytes"] < 1.8 * full
    assert full < none["peak_bytes"] < 1.2 * full
    assert rows["StaticCache+compile"]["status"] == "ok"


def test_a_model_of_ones_own_is_measured_by_its_config(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    path = tmp_path / "bench.json"
    words = ["--model", str(tmp_path), "--layers", "3", "--context", "32", "--steps", "1", "--dtype", "float32"]
    result = invoke("step", *words, "--kv", "none", "--peers", "DynamicCache", "--json", str(path))
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert (content["tables"][0]["layers"], content["model_layers"], content["shape"]) == (3, 2, str(tmp_path))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_cell_of_the_screen_is_cut(measured: tuple[Any, dict[str, Any], Path], width: int) -> None:
    result = Result.read_json(measured[2] / "bench.json")
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(result, console)
    shown = console.export_text()
    assert "…" not in shown
    assert all(name in shown for name in PEERS)
    assert max(len(line) for line in shown.splitlines()) <= width


@pytest.mark.parametrize(("busy", "is_told"), [(0.2, False), (1.5, True), (None, False)])
def test_a_busy_machine_is_told(measured: tuple[Any, dict[str, Any], Path], busy: float | None, is_told: bool) -> None:
    result = Result.read_json(measured[2] / "bench.json")
    assert "load_before" in result.machine
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(replace(result, machine={**result.machine, "load_before": busy}), console)
    assert ("load of 1.5" in console.export_text()) == is_told
    show(replace(result, setting={**result.setting, "busy": 2}), console)
    assert "2 other processes" in console.export_text()


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "bench.md").read_text(encoding="utf-8")
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PEERS) + 2
    assert any(line.startswith("int8 ok ") for line in lines)


def test_the_pages_target_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "bench.md").read_text(encoding="utf-8")
    path = tmp_path / "targets.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    (target,) = read_targets(path)
    assert (target.contender, target.at_least, target.max_error, target.shape) == ("int8", 6.0, 2e-2, "llama-8b")


def test_a_known_beginning_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    words = ["--shape", "tiny", "--steps", "1", "--dtype", "float32", "--context", "1024", "--peers", "DynamicCache"]
    small = ["--kv", "none+reuse:8kB"]
    result = invoke("reuse", *words, "--kv", "none", "--kv", "none+reuse", *small, "--json", str(path))
    assert result.exit_code == 0, result.output
    (table,) = json.loads(path.read_text())["tables"]
    rows = {row["contender"]: row for row in table["rows"]}
    assert table["context"] == 1024
    assert rows["none+reuse"]["p50_ms"] < rows["none"]["p50_ms"]
    assert rows["none+reuse"]["error_logits"] < 1e-5
    assert (rows["none+reuse:8kB"]["status"], rows["none+reuse:8kB"]["p50_ms"]) == ("left out", None)
    assert "does not hold the prefix" in rows["none+reuse:8kB"]["note"]
    result = invoke("prefill", *words, "--kv", "none+reuse")
    assert "see the suite reuse" in " ".join(result.stdout.split())
