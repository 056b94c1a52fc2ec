"""The reference pages name what there is: words of configs, commands and their options; the page of the patch runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

import hfkv
from hfkv.cli.commands import app

DOCS = Path(__file__).parent.parent / "docs"
KV, MOE = re.split(r"^## moe$", (DOCS / "reference" / "config-words.md").read_text(), flags=re.MULTILINE)


def words(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(("page", "config"), [(KV, hfkv.KVConfig), (MOE, hfkv.MoEConfig)])
def test_every_word_is_on_the_page_and_can_be_read(page: str, config: Any) -> None:
    listed = words(page)
    for word in listed:
        config.parse("paged+page_size:64" if word == "page_size:64" else with_offload(word))
    with pytest.raises(ValueError, match="allowed: ") as refusal:
        config.parse("no such word")
    allowed = {word.partition(":")[0] for word in str(refusal.value).partition("allowed: ")[2].split(", ")}
    assert {part.partition(":")[0] for word in listed for part in word.split("+")} == allowed


def with_offload(word: str) -> str:
    return f"offload+{word}" if word.startswith("device_budget") else word


def test_every_command_and_option_is_on_a_page() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert re.findall(r"^\| `hfkv (\w+)` \|", page, re.MULTILINE) == list(commands)
    for name, command in commands.items():
        own = DOCS / "reference" / f"{name}.md"
        text = page + (own.read_text() if own.exists() else "")
        suites = getattr(command, "commands", {}).values()
        params = [param for each in (command, *suites) for param in each.params]
        for param in (param for param in params if param.opts[0].startswith("--")):
            spellings = "|".join((*param.opts, *param.secondary_opts))
            assert re.search(rf"({spellings})(?![\w-])", text), f"{name} {spellings}"


def test_the_page_of_the_patch_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "use" / "patch.md").read_text(), re.DOTALL):
        exec(block, names)
    assert "int8+window:512" in capsys.readouterr().out
    assert not hasattr(names["model"], "hfkv")
