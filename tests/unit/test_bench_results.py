"""What is read off a result: which rows are wrong, and a row by any spelling of its config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hfkv.bench import BenchError, Result, Row, Table

ROWS = [
    Row("QuantizedCache:hqq", False, "left out", "needs hqq"),
    Row("DynamicCache", False, p50_ms=12.0),
    Row("int8+paged", True, p50_ms=2.0),
    Row("int4", True, "wrong", "off"),
]


def result() -> Result:
    numbers = {"seed": 0, "copy_bytes_per_second": 1e10, "seconds": 1.0, "model_layers": 2}
    words = {"command": "hfkv bench attention", "date": "2026-01-01", "suite": "attention", "shape": "tiny"}
    tables = [Table(512, 1, [], 1, ROWS), Table(1024, 1, [], 1, ROWS[:3])]
    return Result(**numbers, **words, dtype="bfloat16", setting={}, machine={"device": "cpu"}, tables=tables)


def test_what_was_left_out_is_not_wrong() -> None:
    assert result().wrong == [ROWS[3]]


def test_a_row_is_found_by_any_spelling_of_its_config() -> None:
    first, second = result().tables
    assert first.row("paged+int8") is ROWS[2]
    assert first.row("DynamicCache") is ROWS[1]
    assert second.row("int4") is None


DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


@pytest.mark.parametrize("file", sorted(DOCS.glob("*.json")), ids=lambda file: file.stem)
def test_what_was_written_is_read(file: Path, tmp_path: Path) -> None:
    Result.read_json(file).write_json(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()).keys() >= json.loads(file.read_text()).keys()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((), [], "the result must be an object"),
        (("tables",), None, "tables must be list[Any], got None"),
        (("tables",), [], "has no tables"),
        (("tables", 0), 5, "table 1 must be an object, got 5"),
        (("tables", 0, "rows"), {}, "table 1: rows must be"),
        (("tables", 0, "rows", 1), "x", "table 1, row 2 must be an object"),
        (("tables", 0, "rows", 1, "p50_ms"), "fast", "table 1, row 2: p50_ms must be float | None, got 'fast'"),
        (("tables", 0, "rows", 1, "p50_ms"), float("nan"), "p50_ms must be"),
        (("tables", 0, "rows", 1, "p50_ms"), -1.0, "has a number below 0"),
        (("tables", 0, "rows", 1, "held_bytes"), 1.5, "held_bytes must be int | None, got 1.5"),
        (("tables", 0, "rows", 1, "num_samples"), True, "num_samples must be int, got True"),
        (("tables", 0, "rows", 1, "status"), "fine", "the status 'fine' is unknown"),
        (("tables", 0, "context"), "DEL", "table 1 lacks context"),
        (("tables", 0, "context"), 10**400, "context must be int"),
        (("tables", 0, "ragged"), ["a"], "ragged must be list[int]"),
        (("suite",), "speed", "the suite 'speed' is unknown"),
        (("seed",), None, "seed must be int"),
        (("machine", "threads"), "DEL", "machine lacks threads"),
        (("machine", "device"), 1, "machine: device must be str"),
        (("setting", "busy"), "much", "setting: busy must be int"),
        (("more",), 1, "has more, which is unknown"),
    ],
)
def test_a_file_with_a_field_that_is_none_is_refused_by_the_field(
    path: tuple[str | int, ...], value: Any, said: str, tmp_path: Path
) -> None:
    content: Any = {"": json.loads((DOCS / "attention-cpu.json").read_text())}
    inner, last = content, ""
    for step in path:
        inner, last = inner[last], step  # type: ignore[assignment]
    if value == "DEL":
        del inner[last]
    else:
        inner[last] = value
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content[""]))
    with pytest.raises(BenchError, match=re.escape(said)):
        Result.read_json(file)


def test_each_table_of_latent_attention_has_a_case(tmp_path: Path) -> None:
    content = json.loads((DOCS / "mla-cpu.json").read_text())
    file = tmp_path / "result.json"
    for cases, said in (
        (content["setting"]["cases"][1:], "names 12 cases of 13 tables"),
        (["x"] * 13, "a case must be"),
    ):
        content["setting"]["cases"] = cases
        file.write_text(json.dumps(content))
        with pytest.raises(BenchError, match=said):
            Result.read_json(file)
