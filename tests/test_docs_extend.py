"""The pages under docs/extend, followed word by word: all code of a page, in its order, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "extend").glob("add-*.md"))


def test_there_are_four() -> None:
    assert [page.stem for page in PAGES] == ["add-a-backend", "add-a-cache-layer", "add-a-codec", "add-a-window-rule"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3 or page.stem == "add-a-cache-layer"
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
