"""The command line: what it prints, where, and what it says when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

import hfkv
from hfkv import tiny_lm
from hfkv.cli.commands import app
from hfkv.cli.demo.runs import DemoReport, DemoSetting
from hfkv.cli.demo.screen import show
from hfkv.cli.generate import PREFILL_CHUNK

PROMPT = "def add(first, second):\n    return "
SMALL = ["--prompt-bytes", "96", "--max-new-tokens", "8", "--window", "32", "--rounds", "1", "--loss-bytes", "200"]


def invoke(*words: str, stdin: str | None = None, columns: int = 120):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(words), input=stdin)


def generate(*words: str, stdin: str | None = None):
    return invoke("generate", *words, "--dtype", "float32", "--max-new-tokens", "24", stdin=stdin)


@pytest.fixture(scope="module")
def bundled():
    return tiny_lm.load(torch.float32)


def stock_text(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def assert_one_line(result, *words: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_the_version_is_the_packages() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"hfkv {hfkv.__version__}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_in_one_line() -> None:
    code = "from hfkv.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "generate", "--max-new-tokens", "4", PROMPT],
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 2
    assert b"error: could not write the output: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_console_script_names_its_commands() -> None:
    code = "from hfkv.cli import main; main()"
    help_page = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "demo" in help_page
    assert "generate" in help_page


# generate


def test_generate_prints_the_models_own_text_and_nothing_else_on_stdout(bundled) -> None:
    result = generate(PROMPT)
    assert result.exit_code == 0, result.output
    assert result.stdout == stock_text(*bundled, PROMPT) + "\n"
    assert result.stderr.count("\n") == 1
    for figure in (f"{1 + len(PROMPT)} prompt tokens", "new tokens", "tokens/s", "bytes (none)"):
        assert figure in result.stderr


def test_a_long_prompt_goes_in_by_chunks_and_gives_the_same_text(bundled) -> None:
    prompt = tiny_lm.held_out_text()[: PREFILL_CHUNK + 50]
    result = generate("-", "--kv", "paged", stdin=prompt)
    assert result.exit_code == 0, result.output
    assert result.stdout == stock_text(*bundled, prompt) + "\n"
    assert f"{PREFILL_CHUNK + 51} prompt tokens" in result.stderr


def test_generate_takes_every_policy_at_once() -> None:
    result = generate(PROMPT, "--kv", "int8+window:16+offload+paged")
    assert result.exit_code == 0, result.output
    assert "int8+window:16+sinks:4+paged+offload" in result.stderr


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    assert_one_line(generate(prompt), "prompt is empty")
    assert_one_line(generate("-", stdin=prompt), "prompt is empty")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kv", "int9+paged"], ["'int9'", "allowed: none, int8"]),
        (["--kv", "window:0"], ["at least 1"]),
        (["--dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--device", "cuda:99"], ["'cuda:99'", "cpu"]),
        (["--device", "toaster"], ["'toaster'", "cpu"]),
        (["--model", "./no/such/folder"], ["'./no/such/folder'", "no folder"]),
        (["--model", "no-such/name"], ["'no-such/name'", "save_pretrained"]),
        (["--lora", "./no/such/adapter"], ["'./no/such/adapter'", "no folder"]),
        (["--max-new-tokens", "0"], ["at least 1", "got 0"]),
        (["--moe", "int9"], ["--moe", "'int9'", "allowed: auto"]),
        (["--moe", "int8"], ["--moe 'int8'", "has no experts", "hfkv.upcycle"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(words: list[str], said: list[str]) -> None:
    assert_one_line(invoke("generate", PROMPT, *words), *said)


def test_generate_with_experts_in_few_bytes(tmp_path: Path, bundled) -> None:
    model, tokenizer = bundled
    sparse = hfkv.upcycle(model, 2, to="mixtral")
    sparse.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for moe in ("auto", "int8"):
        result = generate(PROMPT, "--model", str(tmp_path), "--moe", moe)
        assert result.exit_code == 0, result.stderr
        if moe == "auto":
            assert result.stdout == stock_text(sparse, tokenizer, PROMPT) + "\n"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert_one_line(generate(PROMPT, "--model", str(tmp_path)), "without config.json")


def test_a_model_without_a_kv_cache_is_refused(tmp_path: Path, bundled) -> None:
    config = MambaConfig(vocab_size=259, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    bundled[1].save_pretrained(tmp_path)
    assert_one_line(generate(PROMPT, "--model", str(tmp_path)), "MambaForCausalLM", "no keys and values to cache")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_generate_with_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny_lm.load(torch.float32)
    plain = stock_text(model, tokenizer, PROMPT)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path)
    expected = stock_text(adapted, tokenizer, PROMPT)
    assert expected != plain

    result = generate(PROMPT, "--lora", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n"


def test_an_adapter_without_peft_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_one_line(generate(PROMPT, "--lora", str(tmp_path)), "pip install 'hfkv[lora]'")


# demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    result = invoke("demo", *SMALL, "--dtype", "float32", "--json", str(path))
    assert result.exit_code == 0, result.output
    return result, json.loads(path.read_text())


def test_demo_shows_every_cache(demo) -> None:
    result, numbers = demo
    labels = {(row["cache"], row["kv"]) for row in numbers["rows"]}
    assert labels == set(DemoSetting(window=32).caches())
    for cache, kv in labels:
        assert cache in result.stdout
        assert kv is None or kv in result.stdout
    assert "float32" in result.stdout


def test_demo_numbers_are_those_of_the_caches(demo) -> None:
    rows = {row["kv"]: row for row in demo[1]["rows"]}
    stock = rows[None]
    # Keys and values of 4 layers, 2 heads, 64 numbers of 4 bytes, for BOS, the prompt and all but the last new token.
    assert stock["held_bytes"] == 2 * 4 * 2 * 64 * 4 * (1 + 96 + 7)
    for kv in ("none", "paged", "offload"):
        assert rows[kv]["num_same_tokens"] == rows[kv]["num_new_tokens"] == 8
        assert rows[kv]["held_bytes"] == stock["held_bytes"]
        assert rows[kv]["nats_per_byte"] == pytest.approx(stock["nats_per_byte"], abs=1e-5)
    assert rows["int8"]["held_ratio"] == pytest.approx((64 + 2) / (64 * 4))
    assert rows["int8+window:32"]["held_ratio"] < rows["window:32"]["held_ratio"] < 0.5
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


def test_demo_json_says_where_it_was_measured(demo) -> None:
    machine = demo[1]["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert {"processor", "device", "dtype", "torch", "transformers", "hfkv"} <= machine.keys()


@pytest.mark.parametrize("width", [80, 120])
def test_no_cell_of_the_screen_is_cut(demo, width: int) -> None:
    from hfkv.cli.demo.runs import DemoRow

    numbers = demo[1]
    rows = [DemoRow(**row) for row in numbers["rows"]]
    report = DemoReport(numbers["prompt"], numbers["text"], rows, DemoSetting(**numbers["setting"]), numbers["machine"])
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(report, console)
    assert "…" not in console.export_text()


@pytest.mark.parametrize(
    "words", [["--max-new-tokens", "1"], ["--loss-bytes", "999999999"], ["--json", "no/such/x.json"]]
)
def test_demo_refuses_what_it_cannot_measure(words: list[str]) -> None:
    assert_one_line(invoke("demo", *words), words[1])
