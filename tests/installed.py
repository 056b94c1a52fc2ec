"""What has to hold where nothing but the wheel is there. `.ci/run` copies this file out of the clone and runs it."""

import importlib
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import files, metadata
from pathlib import Path
from typing import Any

import pytest

INSTALLED = Path(sysconfig.get_path("purelib"))
MODULES = sorted(
    ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for path in files("hfkv") or ()
    if path.suffix == ".py" and path.parts[0] == "hfkv"
)


def test_hfkv_is_the_wheels() -> None:
    import hfkv
    import hfkv.patches

    assert Path(hfkv.__file__) == INSTALLED / "hfkv" / "__init__.py"
    assert Path(hfkv.patches.__file__) == INSTALLED / "hfkv" / "patches" / "__init__.py"


def test_every_module_can_be_imported() -> None:
    assert {"hfkv.attention.latent.view", "hfkv.patches.patch", "hfkv.cli"} <= set(MODULES)
    for name in MODULES:
        importlib.import_module(name)


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--prompt-bytes", "300", "--max-new-tokens", "8", "--rounds", "1", "--loss-bytes", "600"),
        ("generate", "--kv", "int8+window:512", "--max-new-tokens", "8", "def parse("),
        ("doctor",),
    ],
    ids=lambda words: words[0],
)
def test_commands(words: tuple[str, ...], tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("hfkv")
    run = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_readmes_examples_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    readme: Any = metadata("hfkv")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", readme.get_payload(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
