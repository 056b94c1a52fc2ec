"""The README's Python runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch

from hfkv.experts.packed import unpackable

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_readmes_examples_run(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first, second, third, fourth = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert "def parse(" in capsys.readouterr().out
    exec(second, names)
    assert 0 < names["cache"].held_bytes() <= names["cache"].nbytes()
    exec(third, names)
    assert names["cache"].holds_tokens.shape[1] == names["text"].shape[1] - 1
    assert names["model"].hfkv.reuse_stats().lookups > 0
    exec(fourth, names)
    assert "MixtralExperts" in capsys.readouterr().out
    packed = unpackable(torch.zeros(1, 16, 16, dtype=names["sparse"].dtype)) is None
    assert {swap.form for swap in names["handle"].moe.swapped} == {"packed" if packed else "plain"}
