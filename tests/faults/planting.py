"""A copy of the repository with one fault in it, and what its tests say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.faults.fault import Fault

ROOT = Path(__file__).resolve().parents[2]
TIERS = {"default": "not slow and not compile", "slow": "slow"}
_COPIED = ("hfkv", "patches", "tests", "docs", "examples")
_LEFT_OUT = shutil.ignore_patterns("__pycache__")
_WHERE = "import hfkv, hfkv.patches, tests; print(*(m.__file__ for m in (hfkv, hfkv.patches, tests)), sep='\\n')"
_FOUND = re.compile(r"^(?:FAILED|ERROR) (.+?::.+?)(?: - .*)?$", re.MULTILINE)


def planted_text(fault: Fault) -> str:
    """The text of a fault's file with the fault in it.

    Raises:
        ValueError: the file does not have the old text exactly once.
    """
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has {fault.old!r} {count} times, and once is wanted")
    return text.replace(fault.old, fault.new)


def plant(fault: Fault, folder: Path) -> None:
    """Copies the repository to a folder that is not there yet, with the fault in it."""
    text = planted_text(fault)
    for name in _COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=_LEFT_OUT)
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.txt")):
        shutil.copy(file, folder)
    # As the installed package has it: there the finder of an editable install would lead to the original.
    (folder / "hfkv" / "patches").symlink_to(folder / "patches", target_is_directory=True)
    (folder / fault.file).write_text(text, encoding="utf-8")


def first_to_find(fault: Fault, folder: Path, tier: str) -> str | None:
    """The first test of a tier that fails in a planted copy, or None where all pass.

    Raises:
        RuntimeError: the copy is not what is imported, or its tests do not run.
    """
    given = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    where = subprocess.run([sys.executable, "-c", _WHERE], cwd=folder, env=given, capture_output=True, text=True)
    if not where.stdout or any(not Path(file).is_relative_to(folder) for file in where.stdout.split("\n") if file):
        raise RuntimeError(f"{fault.name}: {folder} is not what is imported: {where.stdout or where.stderr}")
    files = [f"tests/{file}" for file in fault.tests]
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", TIERS[tier]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=folder, env=given, capture_output=True, text=True
    )
    if run.returncode in (0, 5):  # all pass, or there are none in this tier
        return None
    found = _FOUND.search(run.stdout)
    if run.returncode != 1 or found is None:
        raise RuntimeError(f"{fault.name}: its tests do not run:\n{run.stdout[-4000:]}{run.stderr[-2000:]}")
    return found[1].removeprefix("tests/")
