"""Tables on narrow terminals: no number is cut, and what is left out is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.text import Text
from typer.testing import CliRunner

from hfkv.cli.commands import app
from hfkv.cli.tables import NARROWEST, drop_to_fit, one_line, plain_text, table_of

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
KEPT = {"attention": "4.45", "memory": "2,048", "moe": "0.83", "mla": "82.87", "step": "3.97", "reuse": "93.66"}


def shown(columns: int, *words: str) -> str:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(words))
    assert result.exit_code in (0, 1)
    return result.output


@pytest.mark.parametrize("width", range(20, 60, 4))
def test_no_cell_is_cut_and_the_first_column_stays(width: int) -> None:
    columns = {f"header\n{index}": [Text("1.2345"), Text("9" * (index + 5))] for index in range(4)}
    names = [Text("a name that is long"), Text("x" * 30)]
    given = dict(columns)
    dropped = drop_to_fit(columns, width, ("header\n1",), 20)
    text = plain_text(table_of("name\n", names, columns), width)
    assert [*columns] == [header for header in given if header not in dropped]
    assert "header\n0" in columns
    assert dropped[:1] == ["header\n1"][: len(dropped)]
    for cells in columns.values():
        assert all(re.search(rf"(^| ){re.escape(cell.plain)}( |$)", text, re.MULTILINE) for cell in cells)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert NARROWEST < 20


def test_headers_are_named_in_a_line() -> None:
    assert one_line("× with-\nout LoRA") == "× without LoRA"
    assert one_line("loss\nnats") == "loss nats"


@pytest.mark.parametrize("suite", KEPT)
def test_results_on_a_narrow_terminal(suite: str) -> None:
    words = ("bench", "--from", str(DOCS / f"{suite}-cpu.json"))
    narrow = shown(40, *words)
    assert "…" not in narrow
    assert f" {KEPT[suite]} " in narrow
    assert "wider terminals show" in " ".join(narrow.split())


def test_verdicts_and_a_plan_on_a_narrow_terminal() -> None:
    words = ("bench", "--from", str(DOCS / "attention-cpu.json"), "--check", str(DOCS / "targets-cpu.toml"))
    verdicts = shown(40, *words)
    assert "error ≤ 0.02: 9.5e-03, held" in " ".join(verdicts.split())
    plan = shown(40, "plan", "tiny", "--memory", "1GiB", "--device", "cpu", "--bandwidth", "1TB/s")
    for text in (verdicts, plan):
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 40


def test_a_terminal_without_a_width_is_shown_all() -> None:
    words = ("plan", "tiny", "--memory", "1GiB", "--device", "cpu", "--bandwidth", "1TB/s")
    assert shown(0, *words) == shown(80, *words)
    assert shown(3, *words) == shown(40, *words)
