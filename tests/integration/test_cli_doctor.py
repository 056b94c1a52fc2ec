"""`hfkv doctor`: its tables, its exit code, and what it says when something is wrong."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import BloomConfig, Gemma3TextConfig, MambaConfig, PreTrainedConfig, Qwen3NextConfig, T5Config
from typer.testing import CliRunner

from hfkv.cli.commands import app
from hfkv.cli.doctor import machine as doctor_machine
from hfkv.cli.doctor.command import examine
from hfkv.cli.doctor.layers import ModelReport, describe_layers
from hfkv.cli.doctor.machine import TRANSFORMERS, Item, describe_installation
from hfkv.kernels.cpu.int8_matmul import is_exact
from hfkv.kernels.dispatch import Kernel, attention_kernel
from hfkv.kernels.experts import crossover as crossovers
from hfkv.kernels.experts.crossover import ANY, Crossover
from hfkv.kernels.naive import attention_naive
from hfkv.kernels.native.library import library, why_not
from hfkv.kernels.selftest import suite as selftest
from hfkv.kernels.selftest.inputs import HeadShape
from hfkv.kernels.selftest.suite import RIGHT, Check, Planned
from tests.tiny import llama_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def invoke(*words: str, columns: int = 100):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["doctor", "--device", "cpu", *words])


@pytest.fixture
def product_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the seconds of a process of its own."""
    check = Check("int8 product", "torch int8", "int8", "all", "none", 0, None, RIGHT)
    monkeypatch.setattr(selftest, "check_int8_product", lambda: check)


def saved(config: PreTrainedConfig, tmp_path: Path) -> str:
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def layers_of(config: PreTrainedConfig, kv: str) -> ModelReport:
    return describe_layers("a model", config, kv, torch.bfloat16, CPU)


def gemma(**changes: Any) -> Gemma3TextConfig:
    fields = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma3TextConfig(**{**fields, "head_dim": 32, "sliding_window": 512, "vocab_size": 99, **changes})


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("doctor")
    result = invoke("--model", saved(gemma(), path), "--kv", "int8+paged", "--json", str(path / "doctor.json"))
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads((path / "doctor.json").read_text())


def test_a_healthy_machine_gives_three_tables_and_exit_code_0(healthy: tuple[str, dict[str, Any]]) -> None:
    output, numbers = healthy
    for words in (
        "Installed",
        "transformers",
        "gemma3_text",
        "Self-test on cpu, bfloat16",
        "int8 product",
        "are right",
    ):
        assert words in output
    assert numbers["is_right"] is True
    assert {check["outcome"] for check in numbers["checks"]} == {"right", "not tested"}
    assert numbers["checks"][-1]["what"] == "int8 product"
    assert numbers["checks"][-1]["outcome"] == ("right" if is_exact() else "not tested")
    # In the shape of the model's own heads.
    assert {tuple(check["heads"].values()) for check in numbers["checks"][:-1]} == {(32, 32, 2, False)}


def test_the_layers_of_a_hybrid_model_are_told_apart(healthy: tuple[str, dict[str, Any]]) -> None:
    output, numbers = healthy
    groups = numbers["model"]["groups"]
    assert [(group["cache"], group["layers"]) for group in groups] == [
        ("int8+paged, model's own window: 512", [0, 1, 2, 3, 4, 6, 7]),
        ("int8+paged", [5]),
    ]
    expected = [attention_kernel("int8", torch.bfloat16, CPU, n, (32, 32)) for n in (1, 1000)]
    for group in groups:
        assert group["heads"] == {"key_dim": 32, "value_dim": 32, "groups": 2, "is_latent": False}
        assert [use["name"] for use in group["uses"]] == ["decode", "prefill", "append"]
        decode, prefill = group["uses"][:2]
        few = f"{expected[0].worth_from / 1e6:.2g} million numbers of keys and values"
        most = f"; up to {few} all are decoded for one call of sdpa" if expected[0].worth_from else ""
        why = expected[0].reason + most
        assert (decode["kernel"], decode["why"]) == (expected[0].name, why)
        assert (prefill["kernel"], prefill["why"]) == expected[1][:2]
    assert "0-4, 6-7" in output
    assert "model's own window: 512" in output
    assert expected[0].name in output


@pytest.mark.usefixtures("without_native")
def test_a_window_is_for_the_layers_that_have_none() -> None:
    sliding, full = layers_of(gemma(), "none+window:64").groups
    assert sliding.cache == "none, model's own window: 512"
    assert [use.name for use in sliding.uses] == ["decode", "prefill", "append"]
    assert full.cache == "none+window:64+sinks:4"
    # On a CPU no kernel reads plain tokens once the window has moved.
    assert [(use.name, use.kernel) for use in full.uses] == [
        ("decode", "cpu flash"),
        ("decode, moved", "sdpa"),
        ("prefill", "cpu flash"),
        ("prefill, moved", "torch blocks"),
        ("append", "torch"),
    ]
    lossy = layers_of(gemma(), "int8+window:64").groups[1]
    of_this_processor = attention_kernel("int8", torch.float32, CPU, 1, (32, 32)).name
    assert [use.kernel for use in lossy.uses] == [of_this_processor, "cpu flash", "torch"]


@pytest.mark.skipif(library() is None, reason=why_not() or "none")
def test_the_native_kernels_are_named(healthy: tuple[str, dict[str, Any]]) -> None:
    output, numbers = healthy
    found = {item["name"]: item["found"] for item in numbers["installed"]}
    assert found["native kernels"] == "compiled"
    assert "native append" in output
    lossy = layers_of(gemma(), "int8+window:64").groups[1]
    assert [use.kernel for use in lossy.uses] == ["native decode", "cpu flash", "native append"]


def test_without_native_kernels_the_doctor_says_why(without_native: None) -> None:
    (item,) = (item for item in describe_installation() if item.name == "native kernels")
    assert item.found is None
    assert "HFKV_NATIVE=0" in item.note


def test_the_doctor_says_what_is_chosen_for_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Crossover(True, {"plain": 4, "int8": ANY, "int4": 0}, {"stock": [4.0, 3.0], "packed": [2.0, 3.0]})
    monkeypatch.setattr(crossovers, "crossover", lambda dtype: found)
    notes = [item.note for item in describe_installation() if item.name.startswith("experts")]
    products = "packed; native products: plain to 4 rows an expert, int8 of any rows, int4 never"
    assert notes == [f"measured (1.00 to 2.00 x plain ones): {products}"] * 2


def test_global_layers_and_heads_are_groups_of_their_own() -> None:
    groups = layers_of(llama_config(num_hidden_layers=4), "int8+window:8+global_layers:0+global_heads:2=1").groups
    assert [group.layers for group in groups] == [[0], [1, 3], [2]]
    assert groups[0].cache == "int8"
    assert groups[2].cache.endswith("all of kv heads 1")


def test_layers_and_models_that_stay_transformers_own_say_why() -> None:
    config = Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, vocab_size=99)
    linear, full = layers_of(config, "int8").groups
    assert (linear.layers, linear.heads, full.layers) == ([0, 1, 2], None, [3])
    assert "LinearAttentionLayer" in linear.cache
    assert "no plain attention layer" in linear.uses[0].why
    report = layers_of(BloomConfig(n_layer=2, hidden_size=64), "int8")
    assert report.notes == [
        "the model keeps its own attention: its code does not go through transformers' attention functions"
    ]
    assert {use.kernel for use in report.groups[0].uses[:2]} == {"decode + own"}
    assert {use.kernel for use in layers_of(T5Config(), "int8").groups[0].uses[:2]} == {"decode + sdpa"}


def test_layers_with_dimensions_of_their_own() -> None:
    # Code without expand_kv caches what it has expanded.
    config = llama_config(kv_lora_rank=8, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16)
    assert layers_of(config, "none").heads == (HeadShape(32, 16, 2),)
    wide = llama_config(num_hidden_layers=3, global_head_dim=48)
    assert layers_of(wide, "none").heads == (HeadShape(48, 48, 2),)
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    if hasattr(gemma4.Gemma4TextConfig(), "per_layer_config"):
        assert {heads.key_dim for heads in layers_of(gemma4.Gemma4TextConfig(), "none").heads} == {256, 512}


def test_a_window_that_needs_the_rotation_is_shown_without_the_weights() -> None:
    report = layers_of(llama_config(), "int8+window:8+sink_positions:cache")
    assert [group.layers for group in report.groups] == [[0, 1]]
    assert "hfkv.patch" in report.notes[0]


def test_the_dtype_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "plan", lambda *_: [])
    folder = saved(llama_config(dtype="float16"), tmp_path)
    assert examine(folder, "none", CPU, None).dtype == "float16"
    assert examine(folder, "none", CPU, torch.float32).dtype == "float32"
    assert examine(None, "none", CPU, None).dtype == "bfloat16"


# Something is wrong.


@pytest.mark.usefixtures("product_is_exact")
def test_a_wrong_kernel_gives_exit_code_1_and_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def kernel(query, *others):
        out, lse = attention_naive(query, *others, dtype=query.dtype)
        return (out + 1 if others[2].is_paged else out), lse

    monkeypatch.setattr(selftest, "attention_kernel", lambda *_: Kernel("broken", "for a test", kernel))
    result = invoke("--json", str(tmp_path / "doctor.json"))
    assert result.exit_code == 1
    assert "hfkv doctor --json" in result.stdout
    assert "wrong: broken, decode of 1, none, paged, plain: an error of" in " ".join(result.stdout.split())
    numbers = json.loads((tmp_path / "doctor.json").read_text())
    assert numbers["is_right"] is False
    wrong = [check for check in numbers["checks"] if check["outcome"] == "wrong"]
    assert {check["store"] for check in wrong} == {"paged"}
    assert f"{len(wrong)} of " in result.stdout


@pytest.mark.usefixtures("product_is_exact")
def test_a_kernel_that_raises_gives_exit_code_1_and_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_):
        raise RuntimeError("out of shared memory\nand a page of it")

    monkeypatch.setattr(selftest, "attention_kernel", lambda *_: Kernel("broken", "for a test", kernel))
    result = invoke()
    assert result.exit_code == 1
    assert "RuntimeError: out of shared memory" in " ".join(result.stdout.split())
    assert "and a page of it" not in result.stdout


def test_a_crash_of_the_int8_product_does_not_end_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "int8_matmul.py"
    path.write_text("import os\ndef int8_matmul(a, b, out):\n    os.abort()\n")
    monkeypatch.setattr(selftest, "INT8_MATMUL", path)
    monkeypatch.setattr(selftest, "is_exact", lambda: True)
    monkeypatch.setattr("hfkv.kernels.selftest.suite.plan", lambda *_: [Planned("int8", selftest.check_int8_product)])
    result = invoke()
    assert result.exit_code == 1
    assert "SIGABRT" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kv", "int9"], ["'int9'", "allowed: none, int8"]),
        (["--kv", "int8", "--model", "./no/such"], ["'./no/such'", "save_pretrained"]),
        (["--dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--device", "cuda:99"], ["'cuda:99'", "cpu"]),
        (["--json", "no/such/x.json"], ["no/such/x.json", "no folder"]),
        (["--json", "."], ["is a folder"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(words: list[str], said: list[str]) -> None:
    assert_refused(invoke(*words), *said)


def test_a_model_that_the_cache_does_not_fit_is_refused(tmp_path: Path) -> None:
    mamba = saved(MambaConfig(vocab_size=99, hidden_size=16), tmp_path)
    assert_refused(invoke("--model", mamba), "no keys and values to cache")
    bloom = saved(BloomConfig(n_layer=2, hidden_size=64), tmp_path)
    assert_refused(invoke("--model", bloom, "--kv", "window:64"), "'bloom' takes no window", "leave the window out")
    t5 = saved(T5Config(), tmp_path)
    assert_refused(invoke("--model", t5, "--kv", "window:64"), "'t5' takes no window", "adds a bias")


def assert_refused(result: Any, *said: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    for words in said:
        assert words in result.stderr


# What is installed.


def found(name: str) -> Item:
    return next(item for item in describe_installation() if item.name == name)


def test_what_is_missing_comes_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = doctor_machine._version
    monkeypatch.setattr(doctor_machine, "_version", lambda name: None if name == "matplotlib" else versions(name))
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda _: None)
    assert (found("matplotlib").found, found("matplotlib").is_odd) == (None, False)
    assert 'pip install "hfkv[plot]"' in found("matplotlib").note
    assert (found("C++ compiler").found, found("torch").found) == (None, torch.__version__)
    assert "g++" in found("C++ compiler").note
    assert torch.backends.cpu.get_cpu_capability() in found("torch").note


@pytest.mark.parametrize(
    ("release", "is_odd"), [("5.16.9", True), ("5.17.0", False), ("5.23.7", False), ("5.24.0", True)]
)
def test_a_transformers_outside_the_range_is_marked(release: str, is_odd: bool) -> None:
    item = doctor_machine._transformers(release)
    assert item.is_odd is is_odd
    assert all(limit in item.note for limit in TRANSFORMERS)


def test_the_range_is_the_packages_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    assert str(required["transformers"]) == f">={TRANSFORMERS[0]}"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert Version(pins["transformers"]).release[:2] == Version(TRANSFORMERS[1]).release
    extras = project["optional-dependencies"]
    for name, (_, remedy) in doctor_machine.OPTIONAL.items():
        if "hfkv[" in remedy:
            extra = remedy.partition("[")[2].partition("]")[0]
            assert name in [Requirement(one).name for one in extras[extra]]


def test_recent_tokens_have_kernels_of_their_own() -> None:
    (group,) = layers_of(llama_config(), "int2+recent:8:int4").groups
    assert group.cache == "int2+recent:8:int4"
    names = [f"{use}, {codec}" for codec in ("int2", "int4") for use in ("decode", "prefill", "append")]
    assert [use.name for use in group.uses] == names
