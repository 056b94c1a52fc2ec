"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hfkv.registration import REGISTRARS

ROOT = Path(__file__).parent.parent
MODULES = {path.stem for path in (ROOT / "hfkv").iterdir()} - {"__init__", "__pycache__"}
ALL_BUT_STAND_IN = ("hfkv.patches", *(f"hfkv.{name}" for name in sorted(MODULES - {"mask", "stand_in"})))
# file or folder -> what it must not import
FORBIDDEN = {
    "hfkv/config.py": ("torch", "transformers"),
    "hfkv/window.py": ("torch", "transformers"),
    "hfkv/schedule.py": ("torch", "transformers"),
    "hfkv/padding.py": ("torch", "transformers"),
    "hfkv/span.py": ("torch", "transformers"),
    "hfkv/words.py": ("torch", "transformers"),
    "hfkv/rotary.py": ("transformers", "hfkv"),
    "hfkv/slots.py": ("transformers", "hfkv.stores", "hfkv.held", "hfkv.layer"),
    "hfkv/summary.py": ("transformers", "hfkv.stores", "hfkv.held", "hfkv.layer"),
    "hfkv/layout.py": ("transformers", "hfkv"),
    "hfkv/machine.py": tuple(f"hfkv.{name}" for name in sorted(MODULES)),
    "hfkv/kernels": (
        "transformers",
        "hfkv.stores",
        "hfkv.held",
        "hfkv.layer",
        "hfkv.view",
        "hfkv.cache",
        "hfkv.config",
    ),
    "hfkv/segments.py": ("transformers", "hfkv.held", "hfkv.stores", "hfkv.layer", "hfkv.view", "hfkv.cache"),
    "hfkv/look.py": ("transformers", "hfkv.layer", "hfkv.view", "hfkv.cache", "hfkv.stores"),
    "hfkv/fused.py": ("transformers", "hfkv.layer", "hfkv.view", "hfkv.cache", "hfkv.stores", "hfkv.codecs"),
    "hfkv/assignment.py": ("transformers", "hfkv.layer", "hfkv.view", "hfkv.cache", "hfkv.stores"),
    "hfkv/device_step.py": ("transformers", "hfkv.attention", "hfkv.patches", "hfkv.stores"),
    "hfkv/keep.py": ("transformers", "hfkv.layer", "hfkv.view", "hfkv.cache"),
    "hfkv/windowed.py": ("transformers", "hfkv.layer", "hfkv.view", "hfkv.cache", "hfkv.stores"),
    "hfkv/stand_in.py": ("transformers", "hfkv"),
    "hfkv/mask.py": ALL_BUT_STAND_IN,
    "hfkv/sizes.py": ("torch", "transformers", "hfkv"),
    "hfkv/reuse.py": ("torch", "transformers"),
    "hfkv/spread.py": ("transformers", "hfkv"),
    "hfkv/modelling.py": ("torch", "transformers", "hfkv"),
    "hfkv/state.py": ("transformers", "hfkv"),
    "hfkv/record.py": ("transformers", "hfkv.layer", "hfkv.stores", "hfkv.cache"),
    "hfkv/contents.py": ("transformers", "hfkv.layer", "hfkv.cache", "hfkv.codecs"),
    "hfkv/stored.py": ("transformers", "hfkv.cache", "hfkv.layer", "hfkv.codecs", "hfkv.view"),
    "hfkv/errors.py": ("torch", "transformers", "hfkv.layer", "hfkv.stores"),
    "hfkv/rows.py": ("transformers", "hfkv.cache", "hfkv.codecs", "hfkv.view"),
    "hfkv/prefixes.py": ("transformers", "hfkv.cache", "hfkv.codecs", "hfkv.patches", "hfkv.attention"),
    "hfkv/tensor_file.py": ("transformers", "hfkv"),
    "hfkv/file_header.py": ("transformers", "hfkv.cache", "hfkv.layer", "hfkv.stores", "hfkv.patches"),
    "hfkv/files.py": ("hfkv.attention", "hfkv.patches", "hfkv.stores", "hfkv.codecs"),
    "hfkv/sharing.py": ("torch", "transformers", "hfkv.patches"),
    "hfkv/split.py": ("hfkv.cache", "hfkv.attention", "hfkv.patches", "hfkv.stores", "hfkv.codecs"),
    "hfkv/codecs": ("transformers", "hfkv.stores", "hfkv.layer", "hfkv.view", "hfkv.config"),
    "hfkv/stores": ("transformers", "hfkv.codecs", "hfkv.layer", "hfkv.view", "hfkv.config", "hfkv.window"),
    "hfkv/held.py": ("transformers", "hfkv.layer", "hfkv.view", "hfkv.cache", "hfkv.config"),
    "hfkv/view.py": ("transformers", "hfkv.stores", "hfkv.codecs", "hfkv.layer", "hfkv.cache"),
    "hfkv/layer.py": ("hfkv.cache", "hfkv.attention", "hfkv.patches"),
    "hfkv/cache.py": ("hfkv.attention", "hfkv.patches"),
    "hfkv/build.py": ("hfkv.cache", "hfkv.attention", "hfkv.patches"),
    "hfkv/attention.py": ("hfkv.cache", "hfkv.patches", "hfkv.stores", "hfkv.codecs"),
    "hfkv/memory.py": ("transformers", "hfkv.cache", "hfkv.attention", "hfkv.patches"),
    "hfkv/meters.py": ("transformers", "hfkv.attention", "hfkv.patches"),
    "hfkv/monitor.py": ("transformers", "hfkv.attention", "hfkv.patches", "hfkv.cli", "matplotlib"),
    "hfkv/monitor_screen.py": ("torch", "transformers", "hfkv.cli"),
    "hfkv/planning/geometry.py": ("hfkv.cache", "hfkv.layer", "hfkv.stores", "hfkv.patches", "hfkv.cli"),
    "hfkv/planning/footprint.py": ("transformers", "hfkv.attention", "hfkv.patches", "hfkv.cli"),
    "hfkv/planning/weights.py": ("hfkv.cache", "hfkv.layer", "hfkv.stores", "hfkv.patches", "hfkv.cli"),
    "hfkv/planning/speeds.py": ("transformers", "hfkv.cache", "hfkv.stores", "hfkv.patches", "hfkv.cli"),
    "hfkv/planning/recommendation.py": ("torch", "transformers", "hfkv.stores", "hfkv.patches", "hfkv.cli"),
    "hfkv/planning/fit.py": ("hfkv.stores", "hfkv.patches", "hfkv.cli", "hfkv.planning.plan"),
    "hfkv/planning/plan.py": ("hfkv.stores", "hfkv.patches", "hfkv.cli"),
    "hfkv/experts": ("hfkv.cache", "hfkv.layer", "hfkv.view", "hfkv.config", "hfkv.patches", "hfkv.moe", "hfkv.cli"),
    "hfkv/experts/config.py": ("torch", "transformers"),
    "hfkv/experts/int8.py": ("transformers",),
    "hfkv/experts/int4.py": ("transformers",),
    "hfkv/experts/packed.py": ("transformers",),
    "hfkv/experts/projection.py": ("transformers",),
    "hfkv/experts/by_expert.py": ("transformers",),
    "hfkv/experts/grouped.py": ("transformers",),
    "hfkv/experts/offload/eviction.py": ("torch", "transformers"),
    "hfkv/experts/offload/slot_table.py": ("torch", "transformers"),
    "hfkv/experts/offload/trace.py": ("torch", "transformers"),
    "hfkv/experts/offload/slots.py": ("transformers",),
    "hfkv/latent": (
        "transformers",
        "hfkv.cache",
        "hfkv.config",
        "hfkv.patches",
        "hfkv.moe",
        "hfkv.cli",
    ),
    "hfkv/planning": ("hfkv.patches", "hfkv.cli", "hfkv.eval"),
    "hfkv/cli": ("hfkv.stores", "hfkv.codecs"),
    "hfkv/moe": ("hfkv.cache", "hfkv.layer", "hfkv.view", "hfkv.config", "hfkv.patches", "hfkv.cli", "hfkv.stores"),
    "hfkv/eval": ("hfkv.cli",),
    "hfkv/bench": ("hfkv.cli",),
    "patches": ("hfkv.cli", "hfkv.stores", "hfkv.codecs"),
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_folder_has_a_rule() -> None:
    for file in [*(ROOT / "hfkv").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]:
        folder = file.parent.relative_to(ROOT).as_posix()
        assert folder == "hfkv" or any(f"{folder}/".startswith(f"{place}/") for place in FORBIDDEN), (
            f"{folder} has no rule of who may import whom; give it one in FORBIDDEN"
        )


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_one_way(place: str) -> None:
    path = ROOT / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        for name in imports(file):
            for forbidden in FORBIDDEN[place]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{file} imports {name}"


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
    seen, waiting = set(REGISTRARS), list(REGISTRARS)
    while waiting:
        importer = waiting.pop()
        for name in runtime_imports(importer):
            # `import transformers` itself loads nothing; its names are loaded where they are used.
            if name.startswith("transformers.") and importer not in REGISTRARS:
                assert any(f"{name}.".startswith(f"transformers.{place}.") for place in ready), f"{importer}: {name}"
            path = ROOT.joinpath(*name.split("."))
            if name.startswith("hfkv.") and name not in seen and (path.is_dir() or path.with_suffix(".py").exists()):
                assert not name.startswith("hfkv.patches")
                seen.add(name)
                waiting.append(name)
    assert {"hfkv.layer", "hfkv.view", "hfkv.experts.offload"} <= seen


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
