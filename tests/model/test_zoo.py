"""Every architecture of transformers that can be built tiny: the same tokens under `patch`, or a refusal; never wrong.

`pytest -m slow tests/model/test_zoo.py --write-docs` writes what was seen to docs/reference/architectures.md.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hfkv
from tests.zoo import Architecture, CannotBuild, architectures, build, generate, inputs_of
from tests.zoo.modes import MODES, outcome
from tests.zoo.outcomes import ERRORS, difference, short

_KINDS = {
    "input_ids": "text",
    "pixel_values": "an image",
    "flattened_patches": "an image",
    "input_features": "sound",
    "input_values": "sound",
    "inputs": "sound",
}
DOCS = Path(__file__).parent.parent.parent / "docs" / "reference" / "architectures.md"
HEADER = """# Architectures

What `hfkv.patch(model)` does to every architecture of transformers {version} that generates text. Each was built tiny,
with random weights, and asked in every mode of the list below, stock and patched, in fp32 on a CPU, with a left-padded
batch, and with an image where one of the usual layouts of pixels fits. Written by
`pytest -m slow tests/model/test_zoo.py --write-docs`, which fails where a token, a shape or a number differs.

- **same, hfkv attention**: the model's decoder attends through hfkv.
- **same, own attention**: the model keeps its attention and reads decoded caches; the reason is logged.
- **refused**: `patch` raises, with the reason.
- **not run**: stock transformers cannot be built tiny, or fails in every mode on what these tests know to give it.

The modes: {modes}.

Layers are those of the cache that are hfkv's, own layers the kinds that stay transformers' own. Stock fails in: modes
that stock code cannot run; there both raise the same kind of error.

{counts}

| mapping | model type | asked with | layers | own layers | result | why | stock fails in |
|---|---|---|---|---|---|---|---|
"""


class Seen:
    """What stock code makes of a model in every mode."""

    def __init__(self, model: Any) -> None:
        self.inputs = inputs_of(model)
        self.asked_with = ", ".join(sorted(_KINDS[name] for name in self.inputs if name in _KINDS))
        names = [name for name in MODES if name != "prompted decoder" or model.config.is_encoder_decoder]
        self.outcomes = {name: outcome(name, model, self.inputs) for name in names if name != "attentions"}
        self.outcomes["attentions"] = outcome("attentions", eager_twin(model), self.inputs)
        self.fails_in = [name for name, found in self.outcomes.items() if isinstance(found, Exception)]

    def differences(self, model: Any, names: Sequence[str]) -> list[str]:
        """Where a patched model does otherwise."""
        found = {name: difference(self.outcomes[name], outcome(name, model, self.inputs)) for name in names}
        return [f"{name}{text}" for name, text in found.items() if text is not None]


def eager_twin(model: Any) -> Any:
    """A copy that hands out attention weights, where the model can."""
    twin = copy.deepcopy(model)
    with contextlib.suppress(ValueError):  # it has no other attention
        twin.set_attn_implementation("eager")
    return twin


def loaded_with_hfkv(model: torch.nn.Module) -> torch.nn.Module:
    """The same model as `from_pretrained(..., attn_implementation="hfkv")` would make it."""
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="hfkv").float().eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def row_of(architecture: Architecture) -> tuple[str, ...]:
    name = (architecture.mapping, architecture.model_type)
    try:
        model = build(architecture)
    except CannotBuild as reason:
        return (*name, "", "", "", "not run", f"cannot be built tiny: {reason}", "")
    try:
        hfkv.patch(model).undo()
    except (ValueError, TypeError, NotImplementedError) as reason:
        return (*name, "", "0", "", "refused", str(reason), "")
    seen = Seen(model)
    if len(seen.fails_in) == len(seen.outcomes):
        return (*name, "", "", "", "not run", f"stock fails: {short(seen.outcomes['greedy'])}", "")
    twin = eager_twin(model)
    with hfkv.patch(twin):
        differences = seen.differences(twin, ["attentions"])
    handle = hfkv.patch(model)
    differences += seen.differences(model, [mode for mode in seen.outcomes if mode != "attentions"])
    assert not differences, f"{architecture}: " + "\n".join(differences)
    own = ", ".join(sorted(set(handle.own_layers.values())))
    layers = (seen.asked_with, str(len(hfkv.KVCache(model).kv_layers)), own)
    result = "same, hfkv attention" if handle.own_attention is None else "same, own attention"
    return (*name, *layers, result, handle.own_attention or "", ", ".join(seen.fails_in))


def line(row: tuple[str, ...]) -> str:
    cells = (" ".join(cell.split()).replace("|", "/")[:160] for cell in row)
    return "| " + " | ".join(cells) + " |"


def write_docs(rows: list[str]) -> None:
    """Writes the table, sorted, with a count of each result."""
    results = [row.split(" | ")[5] for row in rows]
    counts = "; ".join(f"{results.count(result)} {result}" for result in sorted(set(results), reverse=True))
    header = HEADER.format(
        version=transformers.__version__,
        modes=", ".join(MODES),
        counts=f"{len(rows)} architectures: {counts}.",
    )
    DOCS.write_text(header + "\n".join(sorted(rows)) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_loading_with_the_attention_gives_the_same_tokens_or_raises(architecture: Architecture) -> None:
    try:
        model = build(architecture)
        inputs = inputs_of(model)
        torch.manual_seed(0)
        tokens, _ = generate(model, inputs)
    except (CannotBuild, *ERRORS) as reason:
        pytest.skip(short(reason))
    torch.manual_seed(0)
    try:
        ours, _ = generate(loaded_with_hfkv(model), inputs)
    except (ValueError, NotImplementedError, KeyError) as refusal:  # KeyError: from tables of the model's own
        assert "hfkv" in str(refusal)  # noqa: PT017
        return
    assert torch.equal(ours, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_patching_changes_no_token(
    architecture: Architecture, record_property: Callable[[str, object], None], pytestconfig: pytest.Config
) -> None:
    written = line(row_of(architecture))
    record_property("architecture", written)
    if pytestconfig.getoption("--write-docs"):
        return
    docs = DOCS.read_text()
    if f"transformers {transformers.__version__} " in docs:
        assert written in docs, "docs/reference/architectures.md says otherwise; see the first lines of this file"
