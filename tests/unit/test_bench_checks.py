"""Results held against tables of ratios, and results written and read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfkv.bench import BenchError, Result, Row, Table, check_results, read_targets
from hfkv.bench.checks import HELD, MISSED, NOT_MEASURED
from hfkv.bench.setting import PARTS

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def row(contender: str, p50_ms: float | None, is_ours: bool = True, **fields: Any) -> Row:
    return Row(contender, is_ours, p50_ms=p50_ms, **fields)


MACHINE = {
    **dict.fromkeys(("processor", "instructions", "hfkv", "torch", "transformers"), "one"),
    **{"device": "cpu", "threads": 2, "cores": 2, "accelerator": None, "load_before": 0.1},
}


def result(**fields: Any) -> Result:
    rows = [
        row("DynamicCache", 12.0, False),
        row("QuantizedCache:hqq", None, False, status="left out", note="needs hqq"),
        row("int8", 2.0, error_full=1e-2, floor_ratio=1.5),
        row("paged", 6.0, error_full=1e-3, floor_ratio=3.0),
    ]
    given: dict[str, Any] = {
        "command": "hfkv bench attention",
        "date": "2026-01-01T00:00:00+00:00",
        "suite": "attention",
        "shape": "tiny",
        "model_layers": 2,
        "dtype": "bfloat16",
        "seed": 0,
        "setting": {},
        "machine": MACHINE,
        "copy_bytes_per_second": 1e10,
        "seconds": 1.0,
        "tables": [Table(512, 1, [], 1, rows)],
    }
    return Result(**{**given, **fields})


def targets(tmp_path: Path, *ratios: str) -> list[Any]:
    path = tmp_path / "targets.toml"
    basis = 'suite = "attention"\n'
    path.write_text("".join(f"[[ratio]]\n{'' if 'suite' in ratio else basis}{ratio}\n" for ratio in ratios))
    return read_targets(path)


def verdicts(tmp_path: Path, *ratios: str, of: Result | None = None) -> list[tuple[str, Any, str]]:
    seen = check_results(targets(tmp_path, *ratios), [of or result()])
    return [(verdict.contender, verdict.ratio, verdict.verdict) for verdict in seen]


INT8 = 'contender = "int8"\ncontext = 512\n'


def test_a_ratio_is_held_or_missed(tmp_path: Path) -> None:
    assert verdicts(tmp_path, INT8 + "at_least = 6.0") == [("int8", 6.0, HELD)]
    assert verdicts(tmp_path, INT8 + "at_least = 6.01") == [("int8", 6.0, MISSED)]
    assert verdicts(tmp_path, INT8 + 'against = "none+paged"\nat_least = 3') == [("int8", 3.0, HELD)]


def test_a_run_beside_busy_processes_is_held_against_targets_of_such_runs_alone(tmp_path: Path) -> None:
    alone, beside = INT8 + "at_least = 6.0", INT8 + "at_least = 6.0\nbusy = 1"
    assert [verdict for _, _, verdict in verdicts(tmp_path, alone, beside)] == [HELD, NOT_MEASURED]
    of = result(setting={"busy": 1})
    assert [verdict for _, _, verdict in verdicts(tmp_path, alone, beside, of=of)] == [NOT_MEASURED, HELD]
    assert "1 busy beside it" in str(targets(tmp_path, beside)[0])


def test_an_error_and_the_floor_are_held_or_missed(tmp_path: Path) -> None:
    assert verdicts(tmp_path, INT8 + "at_least = 6.0\nmax_error = 1e-2")[0][2] == HELD
    assert verdicts(tmp_path, INT8 + "at_least = 6.0\nmax_error = 9e-3")[0][2] == MISSED
    assert verdicts(tmp_path, INT8 + 'against = "floor"\nat_most = 1.5') == [("int8", 1.5, HELD)]
    assert verdicts(tmp_path, INT8 + 'against = "floor"\nat_most = 1.4') == [("int8", 1.5, MISSED)]


def test_a_star_is_every_contender_of_ours(tmp_path: Path) -> None:
    found = verdicts(tmp_path, 'contender = "*"\ncontext = 512\nat_least = 3.0')
    assert found == [("int8", 6.0, HELD), ("paged", 2.0, MISSED)]


def test_each_of_several_results_of_such_a_run_is_held(tmp_path: Path) -> None:
    table = result().tables[0]
    slow = result(tables=[replace(table, rows=[table.rows[0], row("int8", 24.0)])])
    (target,) = targets(tmp_path, INT8 + "at_least = 6.0")
    for results, expected in (
        ([result(), slow], [(1, HELD), (2, MISSED)]),
        ([slow, result()], [(1, MISSED), (2, HELD)]),
    ):
        seen = check_results([target], results)
        assert [(verdict.result, verdict.verdict) for verdict in seen] == expected


def test_a_wrong_contender_misses_whatever_it_was_to_reach(tmp_path: Path) -> None:
    table = result().tables[0]
    wrong = replace(table, rows=[table.rows[0], row("int8", None, status="wrong", note="off")])
    assert verdicts(tmp_path, INT8 + "at_least = 0.1", of=result(tables=[wrong])) == [("int8", None, MISSED)]


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ('contender = "int4"\ncontext = 512\nat_least = 1.0', "no row 'int4'; it has DynamicCache"),
        ('contender = "int8"\ncontext = 999\nat_least = 1.0', "no context of 999 tokens; it has 512"),
        (INT8 + 'against = "StaticCache+compile"\nat_least = 1.0', "no row 'StaticCache\\+compile'"),
        (INT8 + 'at_least = 1.0\nshape = "small"', "none of the 1 targets is about these results"),
        (INT8 + 'at_least = 1.0\nsuite = "step"', "none of the 1 targets"),
        (INT8 + 'at_least = 1.0\ndevice = "cuda"', "none of the 1 targets"),
    ],
)
def test_a_row_that_is_not_there_is_named(tmp_path: Path, ratio: str, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        verdicts(tmp_path, ratio)


def test_a_peer_that_could_not_run_is_no_miss_and_says_why(tmp_path: Path) -> None:
    against = targets(tmp_path, INT8 + 'against = "QuantizedCache:hqq"\nat_least = 1.0')
    (verdict,) = check_results(against, [result()])
    assert (verdict.verdict, verdict.note) == (NOT_MEASURED, "QuantizedCache:hqq: needs hqq")


def test_targets_of_other_runs_are_said_not_to_be_measured(tmp_path: Path) -> None:
    other = 'suite = "step"\n' + INT8 + "at_least = 99.0"
    assert [verdict for _, _, verdict in verdicts(tmp_path, INT8 + "at_least = 6.0", other)] == [HELD, NOT_MEASURED]
    ragged = INT8 + "at_least = 6.0\nragged = [512, 9]"
    assert [verdict for _, _, verdict in verdicts(tmp_path, INT8 + "at_least = 6.0", ragged)] == [HELD, NOT_MEASURED]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "is not TOML"),
        ("", r"must hold tables \[\[ratio\]\]"),
        ('other = 1\n[[ratio]]\nsuite = "step"', "got other"),
        ('[[ratio]]\nsuite = "step"', "ratio 1 lacks contender, context"),
        ('[[ratio]]\nsuite = "step"\ncontender = "int8"\ncontext = 1', "neither at_least"),
        ('[[ratio]]\nsuite = "speed"\ncontender = "int8"\ncontext = 1\nat_least = 1', "allowed: attention"),
        ('[[ratio]]\nsuite = "step"\ncontender = "int8"\ncontext = 1\nat_lest = 1', "'at_lest' is unknown; allowed"),
        ('[[ratio]]\nsuite = "step"\ncontender = "int8"\ncontext = "1"', "context must be of type int"),
        ('[[ratio]]\nsuite = "step"\ncontender = "int8"\ncontext = 1\nat_most = 1', "says at_most"),
        (
            '[[ratio]]\nsuite = "step"\ncontender = "int8"\ncontext = 1\nagainst = "floor"\nat_least = 1',
            "says at_least",
        ),
    ],
)
def test_a_file_that_says_nothing_clear_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "targets.toml"
    path.write_text(text)
    with pytest.raises(BenchError, match=said):
        read_targets(path)


@pytest.mark.parametrize("name", ["targets-cpu.toml", "targets-gpu.toml"])
def test_the_tables_in_docs_can_be_read(name: str) -> None:
    assert len(read_targets(DOCS / name)) >= 8


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result().write_json(path)
    assert Result.read_json(path) == result()
    path.write_text('{"rows": []}')
    with pytest.raises(BenchError, match="is no result"):
        Result.read_json(path)
    with pytest.raises(BenchError, match="could not be read"):
        Result.read_json(tmp_path / "none.json")


MLA = '[[ratio]]\nsuite = "mla"\ncontender = "int8"\n'


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (f"{MLA}context = 8\nat_least = 1.0", f"part None of the suite mla is unknown; allowed: {', '.join(PARTS)}"),
        (f'{MLA}context = 8\nat_least = 1.0\npart = "prompt"', "'prompt'"),
        (f'{MLA}context = 8\nat_least = 1.0\npart = "step"\nqueries = "8"', "queries must be of type int, got '8'"),
        (f'{MLA}context = 8\nat_least = 1.0\npart = "step"'.replace("mla", "step"), "got the suite 'step'; leave"),
    ],
)
def test_a_target_says_its_part(entry: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "targets.toml"
    path.write_text(entry)
    with pytest.raises(BenchError, match=said):
        read_targets(path)
