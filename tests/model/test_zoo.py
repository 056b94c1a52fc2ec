"""Every architecture of transformers that can be built tiny: the same tokens under `patch`, or a refusal; never wrong.

`pytest -m slow tests/model/test_zoo.py --write-docs` writes what was seen to docs/architectures.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import hfkv
from tests.zoo import Architecture, CannotBuild, architectures, build, generate, prompt

DOCS = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
HEADER = """# Architectures

What `hfkv.patch(model)` does to every architecture of transformers {version} that generates text. Each was built tiny,
with random weights, and generated greedily from a left-padded batch, stock and patched, in fp32 on a CPU. Written by
`pytest -m slow tests/model/test_zoo.py --write-docs`, which fails where a token differs.

- **same tokens, hfkv attention**: the model's decoder attends through hfkv.
- **same tokens, own attention**: the model keeps its attention and reads decoded caches; the reason is logged.
- **refused**: `patch` raises, with the reason.
- **not run**: stock transformers cannot build it tiny or generate with it.

{counts}

| mapping | model type | cache layers of ours | layers of transformers' own | result | why |
|---|---|---|---|---|---|
"""


def stock_tokens(architecture: Architecture) -> tuple[torch.nn.Module, dict, torch.Tensor, torch.Tensor] | str:
    try:
        model = build(architecture)
        inputs = prompt(model)
        torch.manual_seed(0)
        tokens, logits = generate(model, inputs)
    except CannotBuild as reason:
        return f"cannot be built tiny: {reason}"
    except Exception as error:  # whatever stock code does with random weights and odd sizes
        return f"stock generate fails: {type(error).__name__}"
    return model, inputs, tokens, logits


def loaded_with_hfkv(model: torch.nn.Module) -> torch.nn.Module:
    """The same model as `from_pretrained(..., attn_implementation="hfkv")` would make it."""
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="hfkv").float().eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def row_of(architecture: Architecture) -> tuple[str, ...]:
    found = stock_tokens(architecture)
    name = (architecture.mapping, architecture.model_type)
    if isinstance(found, str):
        return (*name, "", "", "not run", found)
    model, inputs, tokens, logits = found
    try:
        handle = hfkv.patch(model)
    except ValueError as reason:
        return (*name, "0", "", "refused", str(reason))
    torch.manual_seed(0)
    ours, our_logits = generate(model, inputs)
    assert torch.equal(ours, tokens), (
        f"{architecture}: patched tokens differ: {ours.tolist()} against {tokens.tolist()}"
    )
    scale = logits[logits.isfinite()].abs().max().clamp(min=1).item()
    torch.testing.assert_close(our_logits, logits, atol=1e-4 * scale, rtol=1e-3)
    kept = handle.own_layers
    layers = (str(len(hfkv.KVCache(model).kv_layers)), ", ".join(sorted(set(kept.values()))))
    if handle.own_attention is None:
        return (*name, *layers, "same tokens, hfkv attention", "")
    return (*name, *layers, "same tokens, own attention", handle.own_attention)


def line(row: tuple[str, ...]) -> str:
    cells = (" ".join(cell.split()).replace("|", "/")[:160] for cell in row)
    return "| " + " | ".join(cells) + " |"


def write_docs(rows: list[str]) -> None:
    """Writes the table, sorted, with a count of each result."""
    results = [row.split(" | ")[4] for row in rows]
    counts = "; ".join(f"{results.count(result)} {result}" for result in sorted(set(results), reverse=True))
    header = HEADER.format(version=transformers.__version__, counts=f"{len(rows)} architectures: {counts}.")
    DOCS.write_text(header + "\n".join(sorted(rows)) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(), ids=str)
def test_loading_with_the_attention_gives_the_same_tokens_or_raises(architecture: Architecture) -> None:
    found = stock_tokens(architecture)
    if isinstance(found, str):
        pytest.skip(found)
    model, inputs, tokens, _ = found
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
        assert written in docs, "docs/architectures.md says otherwise; see the first lines of this file"
