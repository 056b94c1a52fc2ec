"""Which products of experts are taken: measured once a machine, kept, and never one that is slower than plain ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from hfkv.experts.packed import unpackable, why_plain
from hfkv.kernels.experts import crossover as measured
from hfkv.kernels.experts.crossover import ANY, ROWS, Crossover, by_table, chosen, crossover, most_native_rows
from hfkv.kernels.native.library import library, why_not

BF16 = torch.bfloat16
TIMES = {
    "stock": [10.0, 10.0, 10.0, 20.0, 40.0],
    "packed": [7.0, 7.0, 11.0, 19.0, 39.0],
    "plain native": [5.0, 8.0, 12.0, 20.0, 40.0],
    "int8 native": [3.0, 4.0, 9.0, 20.0, 40.0],
    "int8 decoded": [12.0, 12.0, 12.0, 22.0, 42.0],
    "int4 native": [13.0, 3.0, 3.0, 3.0, 3.0],
    "int4 decoded": [12.0, 12.0, 12.0, 22.0, 42.0],
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where a machine that has measured nothing yet keeps what it measures."""
    monkeypatch.setenv("HFKV_MEASURE", "1")
    monkeypatch.setenv("HFKV_CACHE", str(tmp_path))
    measured.forget()
    yield tmp_path / "native"
    monkeypatch.undo()
    measured.forget()


def test_what_is_chosen_is_nowhere_slower() -> None:
    found = chosen(TIMES, by_table(BF16))
    # At 16 rows packed ones are slower; plain ones go to the native kernels up to the rows before.
    assert not found.packs
    assert found.most_rows == {"plain": 4, "int8": ANY, "int4": 0}
    assert chosen({**TIMES, "packed": TIMES["stock"]}, by_table(BF16)).packs
    # What was not measured for lack of time is not taken.
    short = {way: times[:2] for way, times in TIMES.items()}
    assert chosen(short, by_table(BF16)).most_rows["int8"] == ROWS[1]


def test_a_machine_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = mock.Mock(return_value=TIMES)
    monkeypatch.setattr(measured, "measure", measure)
    found = crossover(BF16)
    # Packing is given up after a second look only.
    assert measure.call_count == 2
    assert found.is_measured
    (kept,) = folder.glob("experts-*.json")
    measured.forget()
    assert crossover(BF16) == found
    assert measure.call_count == 2
    for foreign in ("", "[]", "{}", json.dumps({"packs": 1, "most_rows": {}, "microseconds": {"stock": []}})):
        kept.write_text(foreign)
        measured.forget()
        assert crossover(BF16) == found
        assert json.loads(kept.read_text())["most_rows"] == found.most_rows
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".so"] == [".json"]


def test_of_processes_that_measure_at_once_the_first_ones_word_counts(folder: Path) -> None:
    first, second = (Crossover(packs, dict.fromkeys(measured.FORMS, 4), TIMES) for packs in (True, False))
    folder.mkdir(parents=True)
    assert measured._keep(folder / "experts-x.json", first) == first
    assert measured._keep(folder / "experts-x.json", second) == first
    assert len(list(folder.iterdir())) == 1


def test_without_a_folder_each_process_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    monkeypatch.setattr(measured, "measure", lambda dtype: TIMES)
    assert crossover(BF16).is_measured
    assert not list(folder.iterdir())


def test_a_word_switches_measuring_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFKV_MEASURE", "0")
    monkeypatch.setattr(measured, "measure", mock.Mock(side_effect=AssertionError))
    measured.forget()
    assert crossover(BF16) == by_table(BF16)
    assert not crossover(BF16).is_measured
    assert crossover(BF16).packs


def test_experts_stay_plain_where_packing_loses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.zeros(1, 16, 16, dtype=torch.float32)
    if unpackable(matrices):
        pytest.skip("nothing is packed here")
    monkeypatch.setattr(measured, "measure", lambda dtype: TIMES)
    assert "slower at some lengths (HFKV_MEASURE=0" in str(why_plain(matrices))
    measured.forget()
    monkeypatch.setattr(measured, "measure", lambda dtype: {**TIMES, "packed": TIMES["stock"]})
    for kept in folder.glob("*.json"):
        kept.unlink()
    assert why_plain(matrices) is None


@pytest.mark.skipif(library() is None, reason=why_not() or "none")
def test_what_is_measured_is_the_products_themselves() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        times = measured.measure(BF16)
    assert times is not None
    assert set(TIMES) - {"packed"} <= set(times)
    assert all(0 < time < 1e6 for way in times.values() for time in way)
    assert len({len(way) for way in times.values()}) == 1


def test_a_measurement_does_not_see_its_callers_modes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measure(dtype: torch.dtype) -> dict[str, list[float]]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return {**TIMES, "packed": TIMES["stock"]}

    monkeypatch.setattr(measured, "measure", measure)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        crossover(BF16)
    assert seen == [(False, False)]


def test_other_dtypes_are_torchs() -> None:
    assert most_native_rows("plain", torch.float16) == most_native_rows("int8", torch.float64) == 0
