"""Docstrings of public names say what a thing is in whole phrases: no fragment that leaves the noun to the reader."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture import MAY_IMPORT, ROOT, modules, room_of

# Rooms whose docstrings are still to be reread.
LATER: tuple[str, ...] = ()
# What a docstring does not begin with: a preposition, conjunction or pronoun, which leaves the noun to the reader.
NO_BEGINNING = re.compile(
    r"(about|above|after|against|among|around|as|at|before|behind|below|beside|besides|between|beyond|but|by|despite|"
    r"down|during|except|for|from|in|inside|into|it|its|like|near|nobody|nothing|of|off|on|onto|out|outside|over|per|"
    r"since|so|than|that|their|them|they|those|through|till|to|toward|towards|under|until|up|upon|via|when|where|which|"
    r"while|who|whoever|whose|with|within|without)\b",
    re.IGNORECASE,
)
# What is said of an argument does not begin so either, unless a condition comes first: "with `offload`, the budget".
NO_ARGUMENT = ("of", "for", "in", "as", "with", "by", "at", "on", "from", "to", "that", "those")
PHRASES = ("but for", "none but", "whoever", "that of those", "those of those", "handed on", "as ever")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, its public classes and functions, by name."""
    waiting: list[tuple[str, ast.AST]] = [("module", tree)]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield name, text
            if not isinstance(node, ast.Module | ast.ClassDef):
                continue
        for child in ast.iter_child_nodes(node):
            own = getattr(child, "name", None) or ""
            if not own.startswith("_") and not isinstance(child, ast.expr):
                waiting.append((f"{name}.{own}" if own else name, child))


def faults(text: str) -> list[str]:
    """What is wrong with a docstring, in words."""
    first, _, rest = text.partition("\n\n")
    found = []
    beginning = NO_BEGINNING.match(first)
    if beginning:
        found.append(f"begins with {beginning[0]!r}")
    if len(first.split()) < 2:
        found.append("is a single word")
    if "\n" in first:
        found.append("its first sentence is longer than a line")
    if not first.endswith((".", ":")):
        found.append("its first line does not end in a full stop")
    for entry, said in re.findall(r"^    (\*{0,2}\w[\w, *]*: (\w+) [^,\n]*)$", rest, re.MULTILINE):
        if said in NO_ARGUMENT:
            found.append(f"has the fragment {entry!r}")
    flat = " ".join(text.split()).lower()
    return found + [f"says {phrase!r}" for phrase in PHRASES if re.search(rf"\b{phrase}\b", flat)]


@pytest.mark.parametrize("room", [room for room in MAY_IMPORT if room not in LATER])
def test_public_docstrings_are_no_fragments(room: str) -> None:
    found, seen = [], 0
    for module, path in modules().items():
        if room_of(module) == room:
            for name, text in docstrings(ast.parse(path.read_text())):
                seen += 1
                found += [f"{path.relative_to(ROOT)} {name}: {fault}" for fault in faults(text)]
    assert seen
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Of the expert weights.", "begins with 'Of'"),
        ("While it lasts, tokens stay.", "begins with 'While'"),
        ("True.", "is a single word"),
        ("The codec of the weights", "its first line does not end in a full stop"),
        ("The codec.\n\nArgs:\n    dtype: of the queries.", "has the fragment 'dtype: of the queries.'"),
        ("All layers but for the first.", "says 'but for'"),
    ],
)
def test_a_fragment_is_found(text: str, fault: str) -> None:
    assert faults(text) == [fault]


def test_whole_phrases_pass_and_private_names_are_left_alone() -> None:
    tree = ast.parse('"""The codec.\n\nArgs:\n    dtype: the queries\' dtype."""\ndef _f():\n    """Of it."""\n')
    assert [faults(text) for _, text in docstrings(tree)] == [[]]


def test_the_rooms_that_are_left_out_are_rooms() -> None:
    assert set(LATER) <= set(MAY_IMPORT)
