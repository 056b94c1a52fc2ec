"""``hfkv bench mla``: what it prints and writes, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfkv.bench import MLA_SHAPES, cases_of
from hfkv.bench.setting import PARTS
from hfkv.cli.bench.setting import setting_of
from hfkv.measure.timing import COPY_BYTES
from tests.integration.test_cli_bench import cells, invoke
from tests.integration.test_cli_bench_words import NOTHING, refused

TINY = ["--steps", "1", "--dtype", "float32", "--device", "cpu", "--tokens", "48"]


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth from a glance, and nothing tidied up in between: no figure is looked at."""
    monkeypatch.setitem(COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr("hfkv.bench.runner.free_memory", lambda: None)


def test_all_parts_of_a_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='the picture needs matplotlib: pip install "hfkv[plot]"')
    path, picture, targets = tmp_path / "mla.json", tmp_path / "mla.png", tmp_path / "targets.toml"
    ratio = '[[ratio]]\nsuite = "mla"\npart = "decode"\ncontext = 48\nagainst = "none"\ncontender = "int8"\n'
    targets.write_text(f"{ratio}max_held = 0.54\n{ratio}max_held = 0.1\n")
    words = [*TINY, "--shape", "mla-tiny", "--queries", "8", "--kv", "none", "--kv", "int8", "--layers", "2"]
    result = invoke("mla", *words, "--json", str(path), "--plot", str(picture), "--check", str(targets))
    assert result.exit_code == 1, result.output
    assert "1 held, 1 missed" in result.stdout
    assert f"mla decode: mla-tiny ({MLA_SHAPES['mla-tiny']}), float32" in result.stdout
    assert "one layer, 1 new token over 1 × 48 held" in result.stdout
    assert "step of generate(), 1 × 48 tokens held, 2 layers" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.read_text())
    parts = ["decode", "step", "prefill", "crossover"]
    new = [1, 1, 8, 8]
    assert content["setting"]["cases"] == [
        {"part": part, "held": 48, "new": count} for part, count in zip(parts, new, strict=True)
    ]
    for table in content["tables"]:
        assert all(row["status"] == "ok" for row in table["rows"])
    again = invoke("--from", str(path))
    assert (again.exit_code, again.stdout) == (0, result.stdout[: len(again.stdout)])
    shown = cells(again.stdout, "int8")
    for line, table in zip(shown, content["tables"][:3], strict=True):
        row = table["rows"][2]
        error = row["error_logits"] if row["error_full"] is None else row["error_full"]
        assert line[-1] == f"{error:.1e}"
        assert f"{row['speedup']:.2f}" in line
        assert f"{row['held_bytes'] / table['rows'][0]['held_bytes']:.3f}" in line


def test_a_model_of_ones_own_is_measured_by_its_config(tmp_path: Path) -> None:
    MLA_SHAPES["mla-tiny"].config(3).save_pretrained(tmp_path)
    path = tmp_path / "mla.json"
    words = ["--model", str(tmp_path), "--part", "prefill", "--batch", "2", "--kv", "none", "--json", str(path)]
    result = invoke("mla", *TINY, *words)
    assert result.exit_code == 0, result.output
    assert "one layer, prompt of 2 × 48 tokens" in result.stdout
    content = json.loads(path.read_text())
    assert (content["shape"], content["model_layers"]) == (str(tmp_path), 3)
    assert content["setting"]["cases"] == [{"part": "prefill", "held": 0, "new": 48}]


def test_defaults_of_latent_attention() -> None:
    setting = setting_of("mla", NOTHING)
    assert (setting.shape, setting.dtype, setting.seconds) == ("deepseek-v2-lite", "bfloat16", 4.0)
    assert setting.kvs == ("none", "int8", "int4", "paged")
    assert setting.cases == cases_of(PARTS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mla", "--shape", "llama-8b"], ["'llama-8b'", "deepseek-v2-lite, deepseek-v3, mla-tiny"]),
        (["mla", "--shape", "mla-tiny", "--model", "a/b"], ["--shape and --model"]),
        (["mla", "--part", "decode,prompt"], ["'prompt'", "allowed: decode, step, prefill, crossover"]),
        (["mla", "--context", "8"], ["--context means nothing in the suite 'mla'", "--tokens, --part, --queries"]),
        (["mla", "--moe", "int8"], ["--moe means nothing"]),
        (["mla", "--ragged", "8,4"], ["--ragged means nothing"]),
        (["mla", "--tokens", "8,x"], ["--tokens", "'8,x'"]),
        (["mla", "--queries", "0"], ["--queries", "'0'"]),
        (["mla", "--kv", "int9"], ["'int9'", "allowed: none"]),
        (["mla", "--kv", "int8", "--kv", "int8"], ["different caches"]),
        (["mla", "--tokens", "8,8", "--part", "decode"], ["different cases"]),
        (["mla", "--peers", "StaticCache+compile"], ["DynamicCache", "'StaticCache+compile'", "leave it out"]),
        (["mla", "--steps", "0"], ["steps must be at least 1"]),
        (["step", "--part", "decode"], ["--part means nothing in the suite 'step'", "--context"]),
        (["moe", "--queries", "8"], ["--queries means nothing in the suite 'moe'", "--tokens, --moe"]),
    ],
)
def test_a_mistake_about_latent_attention_is_one_line_with_the_remedy(words: list[str], said: list[str]) -> None:
    message = refused(*words, "--device", "cpu")
    for word in said:
        assert word in message
