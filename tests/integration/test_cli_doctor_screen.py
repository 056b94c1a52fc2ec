"""What `hfkv doctor` shows fits the screen, whatever the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from hfkv.cli.doctor.layers import LayerGroup, ModelReport, Use
from hfkv.cli.doctor.machine import Item, describe_installation
from hfkv.cli.doctor.report import DoctorReport
from hfkv.cli.doctor.screen import STYLES, ranges, show
from hfkv.kernels.selftest import suite as selftest
from hfkv.kernels.selftest.inputs import HeadShape
from hfkv.kernels.selftest.suite import Check
from tests.integration.test_cli_doctor import CPU, gemma, layers_of, product_is_exact  # noqa: F401


def shown(width: int, items: list[Item], layers: ModelReport, checks: list[Check]) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(DoctorReport(items, layers, "cpu", "bfloat16", checks, 1.0), console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.usefixtures("product_is_exact")
def test_no_cell_of_the_screen_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SETTINGS", selftest.SETTINGS[:1])
    layers = layers_of(gemma(), "none+window:64+sinks:4+sink_positions:cache+paged+offload")
    checks = [check.run() for check in selftest.plan(CPU, torch.bfloat16)]
    assert "…" not in shown(width, describe_installation(), layers, checks)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_whatever_a_machine_has_to_say_is_shown_whole(width: int) -> None:
    """Every cell is a word longer than the screen, of a letter of its own."""
    letters = iter(map(chr, range(0x4F0, 0x530)))
    words: list[str] = []

    def word() -> str:
        words.append(next(letters) * 150)
        return words[-1]

    items = [Item(name, word(), word(), is_odd) for name, is_odd in (("bitsandbytes", False), ("GPU", True))]
    items.append(Item(word(), None))
    groups = [
        LayerGroup(
            word(), heads, [Use(name, word(), word()) for name in ("prefill, moved", word())], list(range(0, 99, 2))
        )
        for heads in (HeadShape(576, 512), None)
    ]
    failed = [Check("decode", word(), "int8", "paged", "plain", 1, None, outcome, 1e9, 1e-5) for outcome in STYLES]
    alike = [replace(check, kernel=failed[0].kernel, what="prefill") for check in failed]
    text = shown(width, items, ModelReport("a model", "llama", "int8", [], groups), [*failed, *alike])
    assert "…" not in text
    for each in words:
        assert text.count(each[0]) >= len(each), each[0]
    assert all(outcome in text for outcome in STYLES)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
