"""The house: rooms, who may import whom, and the picture of it in the documentation."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import hfkv
from tests import architecture
from tests.architecture import KEEPS_OUT, MAY_IMPORT, ROOT, circles, imports_of, longest_chain, modules, room_of

HFKV = [module for module in modules() if module != "hfkv"]


def test_every_folder_is_a_room_that_is_listed() -> None:
    folders = {path.name for path in (ROOT / "hfkv").iterdir() if path.is_dir()} - {"__pycache__", "assets"}
    assert folders == set(MAY_IMPORT) - {"patches", "tiny_lm"}
    assert {path.name for path in (ROOT / "hfkv").glob("*.py")} == {"__init__.py", "tiny_lm.py"}
    assert all((path.parent / "__init__.py").exists() for path in modules().values())


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_those_it_may(room: str) -> None:
    seen = 0
    for module in HFKV:
        if room_of(module) != room:
            continue
        seen += 1
        for name, _ in imports_of(modules()[module]):
            # Not hfkv itself either: its names are those of all rooms.
            is_ours = name == "hfkv" or name.startswith("hfkv.")
            allowed = (room, *MAY_IMPORT[room])
            assert not is_ours or room_of(name) in allowed, f"{module}: {name}"
    assert seen


def test_whitelists_only_point_down() -> None:
    order = list(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        lower = order[: order.index(room)]
        assert set(others) - {"tiny_lm"} <= set(lower), room


@pytest.mark.parametrize("room", sorted(KEEPS_OUT))
def test_rooms_keep_libraries_out(room: str) -> None:
    for module in HFKV:
        if room_of(module) == room:
            names = [name for name, for_types in imports_of(modules()[module]) if not for_types]
            assert not architecture.forbidden(names, KEEPS_OUT[room]), module


def test_no_files_import_each_other_round_about() -> None:
    assert circles() == []


def test_the_longest_chain_of_rooms() -> None:
    assert len(longest_chain()) <= 9, longest_chain()


PAGE = (ROOT / "docs" / "understand" / "architecture.md").read_text()


def test_the_documentation_shows_the_house_as_it_is() -> None:
    assert architecture.drawing() in PAGE, "run `python -m tests.architecture` and put what it prints into the page"


@pytest.mark.parametrize("room", [room for room in MAY_IMPORT if room != "tiny_lm"])
def test_the_documentation_names_files_that_are_there(room: str) -> None:
    _, title, section = PAGE.partition(f"\n### {room}\n")
    assert title, f"no section for {room}"
    rows = [line for line in section.partition("\n#")[0].splitlines() if line.startswith("| ")][1:]
    folder = ROOT / ("patches" if room == "patches" else f"hfkv/{room}")
    named = {name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row.split(" | ")[1])}
    assert named
    assert [name for name in sorted(named) if not (folder / name).exists()] == []


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from hfkv.cache.kv_cache import KVCache\n"
        "def f():\n    import hfkv.patches.patch\n    from hfkv.cli import tables\n"
    )
    assert imports_of(file) == (
        ("typing", False),
        ("hfkv.cache.kv_cache", True),
        ("hfkv.patches.patch", False),
        ("hfkv.cli.tables", False),
    )


# Folders with more files than a reader takes in at a glance; none of them is to grow.
CROWDED = {"patches": 26, "hfkv/kernels/triton": 19}


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    counted = Counter(str(path.parent.relative_to(ROOT)) for path in modules().values())
    assert {folder: count for folder, count in counted.items() if count > CROWDED.get(folder, 16)} == {}


def test_files_hold_one_noun_each() -> None:
    for folder in ("hfkv", "patches", "examples", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 320, f"{file} has grown past 320 lines"


def runtime_imports(module: str) -> set[str]:
    """What importing a module of hfkv imports, besides what calls and type checkers do."""
    path = ROOT.joinpath(*module.split("."))
    found = {module.rpartition(".")[0]}
    nodes: list[ast.AST] = [ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef | ast.If):
            nodes += ast.iter_child_nodes(node)
    return found


def test_the_registrars_are_imported_whole_whichever_module_is_the_first() -> None:
    """What they import does not load transformers' model classes, at whose end the registrars are imported."""
    ready = ("cache_utils", "masking_utils", "integrations.moe", "integrations.sdpa_attention", "quantizers", "utils")
    seen, waiting = set(hfkv.REGISTRARS), list(hfkv.REGISTRARS)
    while waiting:
        importer = waiting.pop()
        for name in runtime_imports(importer):
            # `import transformers` itself loads nothing; its names are loaded where they are used.
            if name.startswith("transformers.") and importer not in hfkv.REGISTRARS:
                assert any(f"{name}.".startswith(f"transformers.{place}.") for place in ready), f"{importer}: {name}"
            path = ROOT.joinpath(*name.split("."))
            if name.startswith("hfkv.") and name not in seen and (path.is_dir() or path.with_suffix(".py").exists()):
                assert not name.startswith("hfkv.patches")
                seen.add(name)
                waiting.append(name)
    assert {"hfkv.cache.layers.layer", "hfkv.cache.view", "hfkv.experts.offload"} <= seen


def test_importing_hfkv_registers_its_names_and_nothing_else() -> None:
    code = (
        "from transformers import AttentionInterface as A, DynamicCache as D\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as E\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as Q\n"
        "experts, quantisers = set(E.valid_keys()), set(Q)\n"
        "from transformers.masking_utils import AttentionMaskInterface as M\n"
        "import transformers.cache_utils as c\n"
        "layers = dict(c.DYNAMIC_LAYER_TYPE_MAPPING); before = set(A().valid_keys()), set(M().valid_keys())\n"
        "import hfkv\n"
        "assert set(A().valid_keys()) - before[0] == {'hfkv'}; assert set(M().valid_keys()) - before[1] == {'hfkv'}\n"
        "assert c.DYNAMIC_LAYER_TYPE_MAPPING == layers\n"
        "assert set(E.valid_keys()) - experts == {'hfkv'} == set(Q) - quantisers\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
