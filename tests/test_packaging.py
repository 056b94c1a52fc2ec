"""What pyproject.toml and setup.py say is what the source needs."""

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(path for folder in ("hfkv", "patches") for path in (ROOT / folder).rglob("*.py"))
# Brought by torch where it can run; hfkv.kernels.triton.support asks for it before any of these files is imported.
TRITON = ("hfkv/kernels/triton/*.py", "hfkv/kernels/triton/*/*.py", "hfkv/kernels/experts/triton*.py")
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", text)[0].replace("-", "_") for text in requirements}


def guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether an import stands under TYPE_CHECKING or in a try that catches ImportError."""
    while node in parents:
        child, node = node, parents[node]
        if (
            isinstance(node, ast.Try)
            and child in node.body
            and any("ImportError" in ast.dump(h) for h in node.handlers)
        ):
            return True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
    return False


def asks_for(name: str, tree: ast.AST) -> bool:
    """Whether a module looks for a package with find_spec before it imports it."""
    call = f"find_spec('{name}')"
    return any(isinstance(node, ast.Call) and ast.unparse(node).endswith(call) for node in ast.walk(tree))


def third_party(is_guarded: bool) -> Iterator[tuple[Path, str]]:
    for path, tree in TREES.items():
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                name = module.split(".")[0]
                if name in sys.stdlib_module_names or name == "hfkv":
                    continue
                if (guarded(node, parents) or asks_for(name, tree)) == is_guarded:
                    yield path, name


def test_what_is_imported_without_a_guard_is_required() -> None:
    required = names(PROJECT["dependencies"])
    for path, name in third_party(is_guarded=False):
        is_tritons = name == "triton" and any(map(path.match, TRITON))
        assert name in required or is_tritons, f"{path} imports {name}, which is no dependency; declare or guard it"


def test_what_is_imported_under_a_guard_is_in_an_extra() -> None:
    optional = names([text for texts in PROJECT["optional-dependencies"].values() for text in texts])
    for path, name in third_party(is_guarded=True):
        assert name in optional | names(PROJECT["dependencies"]), f"{path} imports {name}, which no extra has"


def test_every_folder_with_modules_is_a_package_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    packages = {folder.replace("/", ".").replace("patches", "hfkv.patches", 1) for folder in folders}
    assert packages == set(given["packages"])


def test_pins_cover_every_extra() -> None:
    pins = {line.split("==")[0].replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = names([*PROJECT["dependencies"], *(text for t in PROJECT["optional-dependencies"].values() for text in t)])
    assert wanted - {"hfkv", "setuptools"} <= pins
