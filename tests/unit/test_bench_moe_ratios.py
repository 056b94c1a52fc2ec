"""The suite ``moe``: what times are held against, a base and a floor. No time is looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hfkv.bench import MOE_SHAPES, Row, Setting, Table
from hfkv.bench.runner import compared
from hfkv.bench.suite import Cell
from hfkv.bench.suites.moe import PEAK_SIZE, MoESuite, matmul_peak
from hfkv.bench.suites.moe_layers import ours, peers

SETTING = Setting("moe", shape="moe-tiny", contexts=(1, 8), dtype="float32", steps=1)


def unbuilt(setting: Setting = SETTING, device: str = "cpu") -> MoESuite:
    """One whose layers nobody built."""
    made = object.__new__(MoESuite)
    made.setting, made.shape, made.device, made.dtype = (
        setting,
        MOE_SHAPES["moe-tiny"],
        torch.device(device),
        torch.bfloat16,
    )
    made.contenders = [*peers(setting.peers, made.device), ours("auto")]
    made.peak = 1e12
    return made


@pytest.mark.parametrize(
    ("device", "tokens", "without", "base"),
    [
        ("cpu", 1, "", "grouped_mm"),
        ("cuda", 1, "", "batched_mm"),
        ("cuda", 128, "", "batched_mm"),
        ("cuda", 128, "batched_mm", "grouped_mm"),
        ("cuda", 4096, "", "grouped_mm"),
        ("cpu", 1, "grouped_mm", None),
    ],
)
def test_the_base_is_what_transformers_would_run(device: str, tokens: int, without: str, base: str | None) -> None:
    times = {"grouped_mm": 4.0, "batched_mm": 2.0, "hfkv": 1.0}
    rows = [
        Row(name, name == "hfkv", p50_ms=None if name == without else ms, read_bytes=10**6, operations=10**6)
        for name, ms in times.items()
    ]
    table = compared(unbuilt(device=device), Cell(tokens), Table(tokens, 1, [], 1, rows), copy=1e10, bus=None)
    assert table.base == base
    assert table.rows[2].speedup == (None if base is None else times[base])
    assert table.rows[2].floor_ms == pytest.approx(0.1)


def test_the_floor_of_many_tokens_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEAK_SIZE, "cpu", 128)
    rows = [Row("grouped_mm", False, p50_ms=8.0, read_bytes=10**6, operations=4 * 10**9)]
    (row,) = compared(unbuilt(), Cell(1024), Table(1024, 1, [], 1, rows), copy=1e10, bus=None).rows
    assert (row.floor_ms, row.floor_ratio) == (pytest.approx(4.0), pytest.approx(2.0))
    assert matmul_peak(torch.device("cpu"), torch.float32) > 1e6


def test_batched_mm_is_left_out_where_it_would_copy_too_much() -> None:
    made = replace(SETTING, peers=("batched_mm",))
    suite = unbuilt(made)
    (_, batched, hfkv) = suite.contenders
    assert suite.reason(batched, Cell(8)) is None
    assert "copies the weights of every choice: 1.2 GB, run up to 1.0 GB" in str(suite.reason(batched, Cell(4096)))
    assert suite.reason(hfkv, Cell(4096)) is None
