"""The upcycling example runs as it is, in a process of its own, for a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "upcycle_and_finetune.py"


@pytest.mark.slow  # 20 s on one core
def test_upcycle_and_finetune_compares_the_models_and_draws_the_load(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loads.png"
    arguments = ("--steps", "4", "--held-out-blocks", "8", "--threads", "1", "--picture", picture)
    process = subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    rows = {line.split("│")[1].strip(): line.split("│") for line in process.stdout.splitlines() if "│" in line}
    # Upcycling alone changes nothing.
    assert rows["upcycled, untrained"][6].strip() in ("+0.0000", "-0.0000")
    assert rows["dense, as bundled"][5] == rows["upcycled, untrained"][5]
    assert rows["upcycled, trained"][4].strip() == "4"
    assert "Held-out text, before training:" in process.stdout
    assert "Held-out text, after training:" in process.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
