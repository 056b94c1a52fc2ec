"""`docs/benchmarks/gpu.sh`: its commands are good, fit into memory and into the minutes of a lease."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
pytestmark = pytest.mark.slow


def test_a_dry_run_finds_nothing_wrong() -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--dry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(", 0 wrong")


def test_a_dry_run_finds_what_is_wrong() -> None:
    lines = [
        "1 large 300 hfkv bench step --shape llama-8b --layers 32 --batch 64 --context 131072 --device cuda",
        "2 misspelt 10 hfkv bench attention --shape llama-8b --contxt 32768",
        "2 gone 10 bash docs/benchmarks/gone.sh",
    ]
    program = [sys.executable, str(BENCHMARKS / "gpu_dry.py")]
    done = subprocess.run(program, cwd=BENCHMARKS.parent.parent, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    for line, error in zip(said, ("BenchError", "ValueError", "AssertionError"), strict=False):
        assert f"WRONG: {error}" in line
    assert "WRONG: part 1 may take 325 s, more than 240" in said
    assert any(line.startswith("WRONG: nothing measures mla step deepseek-v3") for line in said)
