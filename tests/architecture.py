"""The rooms of hfkv and who imports whom, read from the imports themselves: ``python -m tests.architecture``."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOWEST = ("policy", "codecs", "models", "measure")
CORE = (*LOWEST, "stores", "kernels", "cache")
ABOVE_CACHE = (*CORE, "attention", "sharing", "experts")
PATCHED = (*ABOVE_CACHE, "sparse_moe", "planning", "patches")
# Room -> the rooms whose modules its own may import, at the top, in a function or for a type checker. Not a room's
# own name: inside a room everybody may import everybody, but in no circle.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "policy": (),
    "codecs": ("policy",),
    "models": ("policy", "codecs"),
    "measure": ("policy",),
    "stores": LOWEST,
    "kernels": (*LOWEST, "stores"),
    "cache": (*LOWEST, "stores", "kernels"),
    "attention": CORE,
    "sharing": CORE,
    "experts": CORE,
    "sparse_moe": ABOVE_CACHE,
    "planning": ABOVE_CACHE,
    "patches": (*ABOVE_CACHE, "sparse_moe", "planning"),
    "eval": (*PATCHED, "tiny_lm"),
    "bench": PATCHED,
    "cli": (*PATCHED, "eval", "bench", "tiny_lm"),
    "tiny_lm": (),
}
# What no file of a room imports, besides other rooms.
_NO_SCREENS = ("rich", "typer")
KEEPS_OUT: dict[str, tuple[str, ...]] = {
    **{room: _NO_SCREENS for room in MAY_IMPORT if room not in ("cli", "tiny_lm")},
    "policy": (*_NO_SCREENS, "torch", "transformers"),
    "codecs": (*_NO_SCREENS, "transformers"),
    "stores": (*_NO_SCREENS, "transformers"),
    "kernels": (*_NO_SCREENS, "transformers"),
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of hfkv by its dotted name, `hfkv.patches` among them."""
    found = {}
    for folder, package in ((ROOT / "hfkv", "hfkv"), (ROOT / "patches", "hfkv.patches")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def room_of(module: str) -> str:
    """The room of a module: its first folder, ``""`` for hfkv itself."""
    return module.split(".")[1] if "." in module else ""


@functools.cache
def imports_of(path: Path) -> tuple[tuple[str, bool], ...]:
    """What a file imports anywhere, by dotted name, and whether for a type checker only."""
    return tuple(_imports(ast.parse(path.read_text()), False))


def _imports(node: ast.AST, for_types: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield (full if full in modules() else child.module), for_types
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from _imports(child, for_types or is_typing)


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Module -> the other modules of hfkv that it imports."""
    return {
        module: {name for name, _ in imports_of(path) if name in modules() and name != module}
        for module, path in modules().items()
        if module != "hfkv"
    }


def circles() -> list[list[str]]:
    """Groups of modules that import each other round about (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(arrows().get(module, ())):
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in arrows():
        if module not in index:
            visit(module)
    return found


def room_arrows() -> dict[str, Counter[str]]:
    """Room -> the rooms it imports, each with the number of imports."""
    found: dict[str, Counter[str]] = {}
    for module, others in arrows().items():
        rooms = found.setdefault(room_of(module), Counter())
        rooms.update(room_of(other) for other in others if room_of(other) != room_of(module))
    return found


def longest_chain() -> list[str]:
    """The rooms of the longest chain of imports, from the lowest up."""
    rooms = room_arrows()

    @functools.cache
    def chain(room: str) -> tuple[str, ...]:
        return (*max(map(chain, sorted(rooms.get(room, ()))), key=len, default=()), room)

    return list(max(map(chain, sorted(rooms)), key=len))


def drawing() -> str:
    """The rooms, lowest first, and whom each imports."""
    rooms = room_arrows()
    lines = [f"{'room':<11} imports"]
    for room in MAY_IMPORT:
        others = [other for other in MAY_IMPORT if other in rooms.get(room, ())]
        lines.append(f"{room:<11} {' '.join(others) or '-'}")
    chain = longest_chain()
    return "\n".join((*lines, "", f"longest chain, {len(chain)} rooms: {' <- '.join(chain)}"))


def sizes() -> str:
    """The number of files and of lines in each room."""
    counted: dict[str, list[int]] = {room: [] for room in MAY_IMPORT}
    for module, path in modules().items():
        if room_of(module) in counted:
            counted[room_of(module)].append(len(path.read_text().splitlines()))
    return "\n".join(f"{room:<11}{len(each):>4} files{sum(each):>8,} lines" for room, each in counted.items())


def forbidden(found: Iterable[str], out: tuple[str, ...]) -> list[str]:
    """Those of the imported names that lie in one of the packages `out`."""
    return [name for name in found if any(f"{name}.".startswith(f"{package}.") for package in out)]


if __name__ == "__main__":
    print(drawing(), sizes(), sep="\n\n")
