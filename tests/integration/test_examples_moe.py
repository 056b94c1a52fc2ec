"""The examples about experts run as they are, in processes of their own, for a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example, arguments, folder):
    process = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow  # 20 s on one core
def test_moe_swap_shows_every_way_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "swap.png"
    output = run("moe_swap.py", ("--new-tokens", "12", "--plot", picture), tmp_path)
    rows = {line.split("│")[1].strip(): line.split("│") for line in output.splitlines() if "│" in line}
    assert [name for name in rows if name.startswith("hfkv")] == [
        "hfkv auto",
        "hfkv auto + LoRA",
        "hfkv int8",
        "hfkv int4",
    ]
    losses = {name: float(row[5]) for name, row in rows.items()}
    # In bfloat16: the same numbers in another order, then rounded weights.
    for name, most in (("hfkv auto", 0.005), ("hfkv auto + LoRA", 0.005), ("hfkv int8", 0.01), ("hfkv int4", 0.05)):
        assert abs(losses[name] - losses["transformers eager"]) < most
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # 20 s on one core
def test_upcycle_and_finetune_compares_the_models_and_draws_the_load(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loads.png"
    arguments = ("--steps", "4", "--held-out-blocks", "8", "--threads", "1", "--picture", picture)
    output = run("upcycle_and_finetune.py", arguments, tmp_path)
    rows = {line.split("│")[1].strip(): line.split("│") for line in output.splitlines() if "│" in line}
    # Upcycling alone changes nothing.
    assert rows["upcycled, untrained"][6].strip() in ("+0.0000", "-0.0000")
    assert rows["dense, as bundled"][5] == rows["upcycled, untrained"][5]
    assert rows["upcycled, trained"][4].strip() == "4"
    assert "Held-out text, before training:" in output
    assert "Held-out text, after training:" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
