"""``hfkv eval``: what it prints and writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

import hfkv
from hfkv import tiny_lm
from hfkv.cli.commands import app
from hfkv.cli.eval.runs import EvalReport, EvalRow, EvalSetting
from hfkv.cli.eval.screen import show
from hfkv.cli.tables import wrap
from hfkv.eval import CacheReport, compare, held_out_loss, pass_key_grid
from tests.tiny import llama

# Small enough for a test, and long enough for the window to let go of something.
SMALL = ["--tokens", "600", "--context", "256", "--dtype", "float32"]
KEYS = ["--pass-key-lengths", "128,256", "--pass-key-depths", "2", "--trials", "2"]
CONFIGS = ["--kv", "none", "--kv", "window:96", "--kv", "int8+window:96+sinks:4"]


def invoke(*words: str, columns: int = 120) -> Any:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["eval", *words])


def refused(*words: str) -> str:
    """What it says: one line, and nothing on stdout."""
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    pytest.importorskip("matplotlib", reason='the pictures need matplotlib: pip install "hfkv[plot]"')
    folder = tmp_path_factory.mktemp("eval")
    words = [*SMALL, *KEYS, *CONFIGS, "--json", str(folder / "eval.json"), "--plot", str(folder / "plots")]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result, json.loads((folder / "eval.json").read_text()), folder


def test_the_table_has_a_row_a_config(measured: tuple[Any, dict[str, Any], Path]) -> None:
    result, content, _ = measured
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for row in content["rows"]:
        (line,) = [line for line in lines if line.split()[:1] == [row["kv"]]]
        assert f"{row['nats']:.4f}" in line
        assert f"{row['perplexity']:.3f}" in line
        assert f"{row['held_ratio']:.3f}" in line
    for word in ("KL", "top-1", "attn", "held", "alloc", "keys", "float32", "600 tokens in blocks of 256"):
        assert word in result.stdout


def test_the_full_cache_comes_first_and_once(measured: tuple[Any, dict[str, Any], Path]) -> None:
    assert [row["kv"] for row in measured[1]["rows"]] == ["none", "window:96", "int8+window:96+sinks:4"]
    other = invoke(*SMALL, "--kv", "int8", "--no-pass-keys")
    assert other.stdout.index(" none ") < other.stdout.index(" int8 ")
    assert "keys" not in other.stdout


def test_the_numbers_are_those_of_hfkv_eval(measured: tuple[Any, dict[str, Any], Path]) -> None:
    full, window, both = measured[1]["rows"]
    model, tokenizer = tiny_lm.load(torch.float32)
    text = tiny_lm.held_out_text()
    ids = tokenizer(text[:600], add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert full["nats"] == pytest.approx(held_out_loss(model, ids, 256).nats, abs=1e-5)
    assert full["perplexity"] == pytest.approx(math.exp(full["nats"]))
    assert (full["kl"], full["top1_agreement"], full["perplexity_change_percent"]) == (0, 1, 0)
    assert full["held_bytes"] == 256 * 2 * 4 * 2 * 64 * 4
    assert both["kl"] > 0.9 * window["kl"] > 0
    assert window["held_ratio"] == pytest.approx(100 / 256)
    assert both["held_ratio"] == pytest.approx(100 / 256 * (64 + 2) / (64 * 4))
    assert set(window["attention_similarity_by_layer"]) == {"0", "1", "2", "3"}
    assert full["pass_keys_found"] == 1
    expected = pass_key_grid(model, tokenizer, text, [128, 256], [0, 1], 2, "window:96")
    assert window["pass_keys"] == expected.tolist()
    assert window["pass_keys_found"] == pytest.approx(expected.mean().item())
    assert window["pass_keys_found"] < 1


def test_the_json_says_how_to_measure_again(measured: tuple[Any, dict[str, Any], Path]) -> None:
    _, content, folder = measured
    assert content["command"].startswith("hfkv eval --kv none --kv window:96 --kv int8+window:96+sinks:4 --context 256")
    assert content["command"].endswith(f"--json {folder / 'eval.json'} --plot {folder / 'plots'}")
    assert (content["num_tokens"], content["depths"]) == (600, [0, 1])
    assert content["setting"]["lengths"] == [128, 256]
    assert 0 < content["seconds"] < 600
    machine = content["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["transformers"] == transformers.__version__
    assert machine["hfkv"] == hfkv.__version__
    assert machine["python"] == platform.python_version()
    assert (machine["device"], machine["dtype"]) == ("cpu", "float32")
    assert "tiny-lm" in content["model"]


def test_the_pictures_are_written(measured: tuple[Any, dict[str, Any], Path]) -> None:
    names = {path.name for path in (measured[2] / "plots").iterdir()}
    heat_maps = {f"pass_keys_{name}.png" for name in ("none", "window-96", "int8-window-96-sinks-4")}
    assert names == {"costs.png", "attention_similarity.png", "loss_by_position.png"} | heat_maps


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "eval.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["full"].kl == 0 < names["int8"].kl < names["window"].kl
    assert "tensor([[" in capsys.readouterr().out


def test_a_stream_is_read_through_one_cache(tmp_path: Path) -> None:
    path = tmp_path / "stream.json"
    words = ["--tokens", "600", "--stream", "--kv", "window:96", "--no-pass-keys", "--json", str(path)]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "600 tokens as one stream" in result.stdout
    full, window = json.loads(path.read_text())["rows"]
    assert full["held_bytes"] == 600 * 2 * 4 * 2 * 64 * 2
    assert window["held_ratio"] == pytest.approx(100 / 600)
    assert full["pass_keys"] is None


def test_a_text_and_a_model_of_ones_own(tmp_path: Path) -> None:
    model, tokenizer = llama(vocab_size=259, bos_token_id=257, max_position_embeddings=64), tiny_lm.load()[1]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    text = "Größe: " + "all work and no play " * 30
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    path = tmp_path / "eval.json"
    words = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--kv", "int8"]
    result = invoke(*words, "--context", "100", "--no-pass-keys", "--json", str(path))
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert content["num_tokens"] == len(text.encode())
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert content["rows"][0]["nats"] == pytest.approx(held_out_loss(model, ids, 100).nats, abs=1e-4)
    assert "made for 64 tokens and read up to 100" in " ".join(result.stdout.split())


def test_a_promise_is_found_on_one_text_and_measured_on_another(tmp_path: Path) -> None:
    model, tokenizer = llama(vocab_size=259, bos_token_id=257), tiny_lm.load()[1]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    probe, path = tmp_path / "probe.txt", tmp_path / "eval.json"
    probe.write_text("all work and no play " * 20, encoding="utf-8")
    words = ["--model", str(tmp_path / "model"), "--calibration", str(probe), "--kv", "auto:0.4%", "--kv", "int4"]
    result = invoke(*words, "--tokens", "300", "--context", "100", "--no-pass-keys", "--json", str(path))
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert [row["kv"] for row in content["rows"]] == ["none", "auto:0.4%", "int4"]
    found = content["found"]["auto:0.4%"]
    ids = tokenizer(probe.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    kv = hfkv.KVConfig.for_fidelity(model, ids, 0.004, context=100)
    assert hfkv.KVConfig.from_json(json.dumps(found["kv"])) == kv
    assert max(found["loss_change"], found["kl"]) <= found["promised"] == 0.004
    assert found["num_tokens"] == len(ids)
    report = compare(
        model,
        tokenizer(tiny_lm.held_out_text()[:300], add_special_tokens=False, return_tensors="pt").input_ids[0],
        [kv],
        100,
        calibration=ids,
    )[1]
    assert content["rows"][1]["kl"] == pytest.approx(report.kl, rel=1e-3)
    shown = " ".join(result.stdout.split())
    assert f"of the full bytes; on {len(ids)} tokens of its text" in shown
    assert "auto:0.4%" in result.stdout


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_measured_or_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_lm.load(torch.float32)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "lora")
    ids = tokenizer(tiny_lm.held_out_text()[:300], add_special_tokens=False, return_tensors="pt").input_ids[0]
    expected = held_out_loss(adapted, ids, 256).nats
    path = tmp_path / "eval.json"
    words = ["--tokens", "300", "--context", "256", "--dtype", "float32", "--kv", "int4", "--json", str(path)]
    result = invoke(*words, "--lora", str(tmp_path / "lora"), *KEYS)
    assert result.exit_code == 0, result.output
    full, int4 = json.loads(path.read_text())["rows"]
    assert full["nats"] == pytest.approx(expected, abs=1e-4)
    assert full["nats"] > 1.5  # the bundled model alone is below
    assert 0 < int4["kl"] < 1

    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(tiny_lm.load(torch.float32)[0], prefix).save_pretrained(tmp_path / "prefix")
    message = refused("--tokens", "300", "--lora", str(tmp_path / "prefix"))
    assert "PREFIX_TUNING" in message
    assert "LoRA" in message


def report(kvs: list[str], scale: int) -> EvalReport:
    """Numbers as long as they may come."""
    text = CacheReport(
        kv="",
        nats=11.1234,
        perplexity=123456.7,
        perplexity_change_percent=123456.7,
        kl=11.12345,
        top1_agreement=1.0,
        attention_similarity=-0.12345,
        attention_similarity_by_layer={0: 0.5},
        held_bytes=scale * 2**20,
        allocated_bytes=scale * 2**20,
        held_ratio=1.0,
        num_tokens=9,
        seconds=1.0,
        chunk=128,
        nats_by_position=[1.0],
    )
    rows = [EvalRow(CacheReport(**{**vars(text), "kv": kv}), [[1.0]]) for kv in kvs]
    machine = {"processor": "cpu", "device": "cpu", "threads": 2, "dtype": "bfloat16"}
    versions = {"hfkv": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    return EvalReport("a/model", "a text", 10**6, EvalSetting(), [0.5], rows, 1.0, {**machine, **versions}, 4096)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_cell_of_the_screen_is_cut(width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    kv = "int8+window:4096+sinks:4+paged+page_size:64+offload"
    show(report(["none", kv], 9999), console)
    shown = console.export_text()
    assert "…" not in shown
    assert all(word in shown for word in kv.split("+"))
    assert shown.count("11.1234") == 2
    assert ("alloc\n" in shown.replace(" ", "\n")) == (width > 80)
    assert max(len(line) for line in shown.splitlines()) <= width


def test_a_long_config_is_cut_before_a_plus() -> None:
    assert wrap("int8+window:512+sinks:4", 15) == "int8+window:512\n+sinks:4"
    assert wrap("int8+window:512+sinks:4", 4) == "int8\n+window:512\n+sinks:4"
    assert wrap("none", 2) == "none"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kv", "int9"], ["'int9'", "allowed: none, int8"]),
        (["--kv", "int8", "--kv", "window:0"], ["at least 1"]),
        (["--tokens", "1"], ["--tokens must be at least 2", "got 1"]),
        (["--context", "1"], ["--context must be at least 2"]),
        (["--chunk", "0"], ["--chunk must be at least 1"]),
        (["--trials", "0"], ["--trials must be at least 1"]),
        (["--pass-key-depths", "0"], ["--pass-key-depths must be at least 1"]),
        (["--pass-key-lengths", "512,x"], ["512,1024", "'512,x'"]),
        (["--pass-key-lengths", "40", "--tokens", "10"], ["at least", "not 40"]),
        (["--pass-key-lengths", "999999", "--tokens", "10"], ["a longer text"]),
        (["--tokens", "999999999"], ["--tokens may be at most 168758"]),
        (["--kv", "auto:half"], ["auto takes a percentage such as 0.5%"]),
        (["--kv", "auto:0.5%", "--calibration", "./no/such/file"], ["--calibration 'no/such/file'", "No such file"]),
        (["--kv", "int8", "--calibration", "README.md"], ["--calibration", "such as --kv auto:0.5%"]),
        (["--stream", "--context", "64"], ["--stream", "--context", "one of them"]),
        (["--text", "./no/such/file"], ["'no/such/file'", "No such file"]),
        (["--text", "."], ["Is a directory"]),
        (["--json", "no/such/x.json"], ["no folder 'no/such'"]),
        (["--plot", "README.md"], ["'README.md' cannot be a folder"]),
        (["--model", "./no/such/folder"], ["no folder"]),
        (["--no-pass-keys", "--trials", "4"], ["--trials is about pass keys", "--no-pass-keys", "give one"]),
        (["--pass-key-lengths", "64", "--no-pass-keys"], ["--pass-key-lengths is about pass keys"]),
        (["--pass-key-depths", "99999999999"], ["--pass-key-depths must be at most 1,000"]),
        (["--dtype", "float8"], ["'float8'"]),
        (["--device", "cpu:3"], ["'cpu:3' is not there"]),
        (["--device", "toaster"], ["'toaster'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(
    words: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    message = refused(*words)
    for word in said:
        assert word in message


def test_a_text_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc \xff")
    assert "is not UTF-8 (byte 4" in refused("--text", str(path))
    path.write_text(" \n")
    assert "is empty" in refused("--text", str(path))


def test_a_config_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=259, hidden_size=16, state_size=4, num_hidden_layers=1)
    for part in (MambaForCausalLM(config), tiny_lm.load()[1]):
        part.save_pretrained(tmp_path)
    message = refused("--model", str(tmp_path))
    assert "MambaForCausalLM" in message
    assert "no keys and values to cache" in message


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "hfkv[plot]"' in refused("--plot", str(tmp_path))
