"""Files that a command is to write, and names that no file can have."""

import os
from pathlib import Path

import pytest

from hfkv.cli.commands import app

LONG = "x" * 300
SUITE = ["bench", "memory", "--shape", "tiny"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SUITE, "--json", "a.png", "--plot", "./a.png"], "--json and --plot both name 'a.png'"),
        ([*SUITE, "--json", "a.png", "--plot", "link.png"], "--json and --plot both name"),
        ([*SUITE, "--json", "a.toml", "--check", "a.toml"], "--check and --json both name 'a.toml'"),
        (["plan", "tiny", "--json", "a.png", "--plot", "a.png"], "--json and --plot both name 'a.png'"),
        (["eval", "--json", "a", "--plot", "a"], "--json and --plot both name 'a'"),
        (["eval", "--json", "a.txt", "--text", "a.txt"], "--text and --json both name 'a.txt'"),
        ([*SUITE, "--json", LONG], "cannot be a file: File name too long"),
        (["plan", "tiny", "--plot", f"{LONG}.png"], "cannot be a file: File name too long"),
        (["doctor", "--json", LONG], "cannot be a file: File name too long"),
        (["demo", "--json", f"{LONG}/a"], "cannot be a file: File name too long"),
        (["doctor", "--json", "nowhere/a.json"], "there is no folder 'nowhere'"),
        (["demo", "--json", "."], "is a folder"),
        (["plan", LONG], "File name too long"),
        (["plan", ""], "give a shape, a folder"),
        (["doctor", "--model", ""], "give a folder"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("a.png", "link.png")
    assert app(words, standalone_mode=False) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert os.listdir() == ["link.png"]
