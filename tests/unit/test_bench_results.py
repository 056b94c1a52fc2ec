"""What is read off a result: which rows are wrong, and a row by any spelling of its config."""

from __future__ import annotations

from hfkv.bench import Result, Row, Table

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
